"""Makes `python -m pwm_gym` run the command line."""

from pwm_gym.cli import main

if __name__ == "__main__":
    main()
