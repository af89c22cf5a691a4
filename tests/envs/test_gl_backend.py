"""The choice of MuJoCo's OpenGL backend, with the machine's libraries and variables made up."""

import os

import gymnasium as gym
import pytest

from pwm_gym.envs import gl_backend


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes up a machine and the variables of its shell."""

    def make(egl=False, osmesa=False, platform="linux", **variables):
        monkeypatch.setattr(os, "environ", variables)
        monkeypatch.setattr(gl_backend.sys, "platform", platform)
        monkeypatch.setattr(gl_backend, "_egl_works", lambda: egl)
        monkeypatch.setattr(gl_backend, "_can_load", lambda *libraries: osmesa)
        return variables

    return make


@pytest.mark.parametrize(
    ("egl", "osmesa", "expected"),
    [(True, True, "egl"), (False, True, "osmesa"), (False, False, "disable")],
)
def test_first_backend_that_works_is_chosen(machine, egl, osmesa, expected):
    variables = machine(egl, osmesa)
    assert gl_backend.choose_gl_backend() == expected
    assert variables["MUJOCO_GL"] == expected


def test_users_choice_stands(machine):
    machine(egl=True, MUJOCO_GL="osmesa")
    assert gl_backend.choose_gl_backend() == "osmesa"


@pytest.mark.parametrize("other", [{"DISPLAY": ":0"}, {"platform": "darwin"}])
def test_mujocos_choice_stands_with_a_display_or_on_another_system(machine, other):
    machine(egl=True, **other)
    assert gl_backend.choose_gl_backend() is None


def test_rendering_without_a_library_names_the_packages(machine):
    machine()
    with pytest.raises(gym.error.DependencyNotInstalled, match="apt-get install libegl1 libgl1"):
        gl_backend.require_gl_backend()


def test_drawing_after_a_fork_is_refused(monkeypatch):
    monkeypatch.setattr(gl_backend, "_drawing_process", os.getpid() + 1)
    with pytest.raises(RuntimeError, match='context="spawn"'):
        gl_backend.require_own_process()


def test_missing_library_is_no_error():
    assert not gl_backend._can_load("libpwm_gym_has_no_such_library.so.1")
