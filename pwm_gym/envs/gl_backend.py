"""Choose the OpenGL library with which MuJoCo draws frames on a machine that has no display."""

import ctypes
import os
import sys

import gymnasium as gym

_NO_RENDERING = ("disable", "disabled", "off", "false", "0")  # MUJOCO_GL's words for it
_EGL_PLATFORM_DEVICE_EXT = 0x313F

# The process that drew the first frame.
_drawing_process: int | None = None


def choose_gl_backend() -> str | None:
    """Set the environment variable MUJOCO_GL where nobody has, before dm_control is imported.

    dm_control reads MUJOCO_GL once, at import. Left unset on Linux without a display it picks GLFW
    and can't draw; set to a backend whose library is missing, it fails to import. So each one is
    tried first: EGL (a GPU's driver or Mesa), then OSMesa, and "disable" where neither works. With
    a display, and on other systems, MuJoCo's own choice stands.

    Returns:
        MUJOCO_GL as it now stands, None where it is left unset.
    """
    has_display = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux" and not has_display:
        if _egl_works():
            os.environ["MUJOCO_GL"] = "egl"
        elif _can_load("libOSMesa.so.8", "libOSMesa.so.6"):
            os.environ["MUJOCO_GL"] = "osmesa"
            # dm_control draws with OSMesa in a thread of its own, which is gone when it wants to
            # free the context of an env that nobody closed. With EGL it uses no such thread.
            os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")
        else:
            os.environ["MUJOCO_GL"] = _NO_RENDERING[0]
    return os.environ.get("MUJOCO_GL")


def require_gl_backend() -> None:
    """Raise where MuJoCo can't draw frames.

    Raises:
        gymnasium.error.DependencyNotInstalled: If `choose_gl_backend` found no OpenGL library, or
            the user switched rendering off with MUJOCO_GL.
    """
    backend = choose_gl_backend()
    if backend in _NO_RENDERING:
        raise gym.error.DependencyNotInstalled(
            "Rendering without a display needs an OpenGL library: expected EGL or OSMesa, got none "
            f"(MUJOCO_GL={backend}). On Debian or Ubuntu run `apt-get install libegl1 libgl1`, "
            "then start Python again with MUJOCO_GL unset."
        )


def require_own_process() -> None:
    """Raise where a frame was drawn in another process, from which this one was forked.

    OpenGL's worker threads don't survive a fork: drawing would wait for them forever.

    Raises:
        RuntimeError: If the process that drew the first frame isn't this one.
    """
    global _drawing_process
    if _drawing_process is None:
        _drawing_process = os.getpid()
    elif _drawing_process != os.getpid():
        raise RuntimeError(
            "`render` expected a process of its own, got one that was forked after its parent had "
            "drawn a frame, where OpenGL hangs. Start the workers in another way: AsyncVectorEnv("
            '..., context="spawn") or SubprocVecEnv(..., start_method="spawn").'
        )


def _can_load(*libraries: str) -> bool:
    """Tell whether the dynamic linker finds one of the libraries."""
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def _egl_works() -> bool:
    """Tell whether EGL opens a display on a device, which its users in MuJoCo do at import."""
    has_gl = _can_load("libOpenGL.so.0", "libGL.so.1", "libGLESv2.so.2")
    if not (has_gl and _can_load("libEGL.so.1")):
        return False
    egl = ctypes.CDLL("libEGL.so.1")
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_devices = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not (query_devices and get_display):
        return False
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(
        query_devices
    )
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(get_display)

    devices = (ctypes.c_void_p * 10)()
    count = ctypes.c_int(0)
    if not query_devices(len(devices), devices, ctypes.byref(count)):
        return False
    # The process shares one display per device, without counting its users: leave it open.
    displays = (get_display(_EGL_PLATFORM_DEVICE_EXT, d, None) for d in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)
