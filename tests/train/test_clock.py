"""Seconds of training, without those of compiling."""

import threading
import time

import jax
import jax.numpy as jnp

from bnjax.train.clock import Clock, compile_seconds


def slow_to_compile():
    """A program of its own each time, so that no cache has it."""
    number = time.time_ns() % 1_000_000_007

    def program(x):
        for i in range(300):
            x = jnp.sin(x) * (number + i)
        return x

    return jax.jit(program)


def test_a_lap_leaves_compiling_out():
    clock = Clock()
    begin = time.perf_counter()
    jax.block_until_ready(slow_to_compile()(jnp.ones(3)))
    time.sleep(0.2)
    seconds = clock.lap(2)
    whole = time.perf_counter() - begin
    assert clock.compiling > 0.05
    assert 0.2 <= 2 * seconds <= whole - clock.compiling + 0.05
    time.sleep(0.1)
    clock.restart()
    assert clock.lap(1) < 0.1
    assert clock.steps_in(0.0) == 1


def test_what_another_thread_compiles_is_not_of_this_one():
    before, other = compile_seconds(), []

    def elsewhere():
        start = compile_seconds()
        slow_to_compile()(jnp.ones(3))
        other.append(compile_seconds() - start)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert other[0] > 0.05
    assert compile_seconds() == before


def test_tracing_within_tracing_is_counted_once():
    @jax.jit
    def inner(x):
        time.sleep(0.1)  # runs while it is traced
        return x + 1

    @jax.jit
    def outer(x):
        return inner(inner(x) * 2)

    clock = Clock()
    begin = time.perf_counter()
    jax.block_until_ready(outer(jnp.ones(3)))
    whole = time.perf_counter() - begin
    assert clock.lap(1) > 0
    assert 0.1 < clock.compiling <= whole
