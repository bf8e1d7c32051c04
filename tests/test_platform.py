import jax
import numpy as np

from bnjax import platform


def test_the_options_compile_and_change_no_result():
    options = platform.compiler_options()
    x = np.random.default_rng(0).normal(size=(4, 9, 9, 3)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(3, 3, 3, 5)).astype(np.float32)

    def convolve(x, weight):
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    fast, plain = jax.jit(convolve, compiler_options=options)(x, weight), jax.jit(convolve)(x, weight)
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-4)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(platform, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1", **platform.CPU_OPTIONS})
    assert "xla_cpu_no_such_option" not in platform.compiler_options()


def test_what_the_user_set_is_left_alone(monkeypatch):
    (name,) = platform.CPU_OPTIONS
    assert name in platform.compiler_options()
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
    assert platform.compiler_options() == {}
