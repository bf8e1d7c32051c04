"""Measures the batch norms of several libraries against float64; prints Markdown tables.

    python scripts/compare_libraries.py --write docs/libraries.md

Libraries that are not installed are omitted. `--write` replaces the tables in the page.
"""

import argparse
import functools
import importlib
import os
import re
import textwrap
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from bnjax import norms

eqx, hk, keras, torch = (
    importlib.import_module(name) if find_spec(name) else None
    for name in ("equinox", "haiku", "keras", "torch")
)
EPSILON = 1e-5


class Library:
    """One library's batch norm as pure functions; options have Flax's names.

    `init(x)` returns the statistics of a new layer for inputs [n, c], in the library's own form;
    `call((scale, bias), stats, x, train)` returns the output and the new statistics.
    """

    names = {}  # Flax's name of an option: the library's
    documented = ()  # columns that its documentation explains; the page's footnotes say how
    offers = {}  # column: an option for it
    vjp, vmap, jit, stack = map(staticmethod, (jax.vjp, jax.vmap, jax.jit, jnp.stack))
    mask = staticmethod(lambda real: real[:, None])  # from bool [n]: which examples are real

    def __init__(self, kept=0.99, **options):
        options = {"momentum": kept, "epsilon": EPSILON} | options
        self.options = {self.names.get(name, name): value for name, value in options.items()}

    def array(self, values, dtype="float32"):
        return jnp.asarray(values, dtype)

    def numpy(self, values):
        return np.asarray(values).astype(np.float64)

    def train(self, stats, x, train=True, **mask):
        """Returns the output and the new statistics, with scale 1 and bias 0."""
        affine = [self.array(np.full(x.shape[-1], value)) for value in (1, 0)]
        return self.call(affine, stats, x, train, **mask)

    def fit(self, *batches, **mask):
        """Returns the statistics of a new layer after these batches."""
        stats, train = self.init(batches[0]), self.jit(self.train)
        for x in batches:
            _, stats = train(stats, x, **mask)
        return stats

    def used(self, stats, channels=2):
        """Returns the mean and the variance with which evaluation normalises, in float64."""
        x = self.array(column(0, 1)[:, :channels])
        low, high = self.numpy(self.train(stats, x, train=False)[0])[:, 0]
        return np.round([-low / (high - low), (high - low) ** -2 - EPSILON], 6)


class Linen(Library):
    title, package, there, kind = "Flax linen", "flax", nn, nn.BatchNorm
    documented = ("mask [n], images", "variance at 10,000")
    offers = {"variance at 10,000": {"use_fast_variance": False}}

    def init(self, x):
        layer = self.kind(**self.options)
        return layer.init(jax.random.key(0), x, use_running_average=True)["batch_stats"]

    def call(self, affine, stats, x, train, **mask):
        mode = {"use_running_average": not train, "mutable": ["batch_stats"]}
        variables = {
            "params": dict(zip(("scale", "bias"), affine, strict=True)),
            "batch_stats": stats,
        }
        y, new = self.kind(**self.options).apply(variables, x, **mode, **mask)
        return y, new["batch_stats"]


class Bnjax(Linen):
    title, package, there, kind = "bnjax", "bnjax", norms, norms.BatchNorm
    documented = ()
    offers = {"first steps": {"debias": True}, "stored variance": {"variance": "unbiased"}}


class NNX(Library):
    title, package, there = "Flax NNX", "flax", nnx
    documented = (*Linen.documented, "bfloat16 layer")
    offers = Linen.offers

    def init(self, x):
        self.layer = nnx.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0), **self.options)
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.BatchStat))

    def call(self, affine, stats, x, train, **mask):
        layer = nnx.clone(self.layer)
        nnx.update(layer, dict(zip(("scale", "bias"), affine, strict=True)) | stats)
        y = layer(x, use_running_average=not train, **mask)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


class EquinoxBatch(Library):
    title, package, there, mode = "Equinox, batch", "equinox", eqx, "batch"
    names = {"epsilon": "eps"}
    documented = ("bfloat16 layer", "stored variance", "Explicit mesh")

    def __init__(self, kept=0.99, axis_name=None, **options):
        super().__init__(kept, mode=self.mode, **options)
        self.axes = ("batch",) if axis_name is None else ("batch", axis_name)

    def init(self, x):
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        self.layer, stats = make(x.shape[-1], self.axes, **self.options)
        return stats

    def call(self, affine, stats, x, train, **mask):
        layer = eqx.tree_at(lambda layer: [layer.weight, layer.bias], self.layer, affine)
        call = functools.partial(layer, inference=not train, **mask)
        return jax.vmap(call, (0, None), (0, None), axis_name="batch")(x, stats)


class EquinoxEMA(EquinoxBatch):
    title, mode = "Equinox, ema", "ema"
    documented = ("bfloat16 layer", "gradients", "gradients at 1,000", "Explicit mesh")


class Haiku(Library):
    title, package, there = "Haiku", "dm-haiku", hk
    axes = {"axis_name": "cross_replica_axis"}
    axes |= {"axis_index_groups": "cross_replica_axis_index_groups"}
    names = {"momentum": "decay_rate", "epsilon": "eps", **axes}
    documented = ("bfloat16 input",)

    def transformed(self, **options):
        def call(x, train, **mask):
            return hk.BatchNorm(True, True, **self.options | options)(x, train, **mask)

        return hk.without_apply_rng(hk.transform_with_state(call))

    def init(self, x):
        return self.transformed(**dict.fromkeys(self.axes.values())).init(None, x, True)[1]

    def call(self, affine, stats, x, train, **mask):
        scale, offset = affine
        params = {"batch_norm": {"scale": scale[None], "offset": offset[None]}}
        return self.transformed().apply(params, stats, x, train, **mask)


class Keras(Library):
    title, package, there = "Keras on JAX", "keras", keras
    documented = ("shards", "mask [n], images")
    offers = {"bfloat16 layer": {"dtype": "mixed_bfloat16"}}
    mask = staticmethod(lambda real: real)

    def __init__(self, kept=0.99, axis_name=None, **options):
        super().__init__(kept, synchronized=axis_name is not None, **options)

    def init(self, x):
        self.layer = keras.layers.BatchNormalization(**self.options)
        self.layer.build(x.shape)
        return [variable.value for variable in self.layer.non_trainable_variables]

    def call(self, affine, stats, x, train, **mask):
        return self.layer.stateless_call(affine, stats, x, training=train, **mask)


class Torch(Library):
    title, package, there = "torch", "torch", torch
    names = {"epsilon": "eps"}
    documented = ("weight of a new batch", "stored variance", "shards")
    jit = staticmethod(lambda function: function)
    if torch:
        vjp, vmap, stack = map(staticmethod, (torch.func.vjp, torch.func.vmap, torch.stack))

    def __init__(self, kept=0.99, dtype="float32", **options):
        super().__init__(1 - kept, dtype=getattr(torch, dtype), **options)

    def array(self, values, dtype="float32"):
        return torch.tensor(np.asarray(values), dtype=getattr(torch, dtype))

    def numpy(self, values):
        return values.double().numpy()

    def init(self, x):
        self.layer = torch.nn.BatchNorm1d(x.shape[-1], **self.options)
        return dict(self.layer.named_buffers())

    def call(self, affine, stats, x, train, **mask):
        stats = {name: leaf.clone() for name, leaf in stats.items()}  # it writes them in place
        weight, bias = (leaf.to(self.options["dtype"]) for leaf in affine)
        leaves = {"weight": weight, "bias": bias, **stats}
        return torch.func.functional_call(self.layer.train(train), leaves, (x,), mask), stats


LIBRARIES = (Bnjax, Linen, NNX, EquinoxBatch, EquinoxEMA, Haiku, Keras, Torch)
COLUMNS = {}  # section: [(title, truth, function, arguments, options)]


def measured(section, title, truth, *arguments, **options):
    """Registers a column: what a function finds of a layer with these options, and the truth.

    Of several for one function the lowest is the leftmost column.
    """

    def register(function):
        COLUMNS.setdefault(section, []).append((title, truth, function, arguments, options))
        return function

    return register


def column(*values):
    """Returns float32 [n, 2]: two channels with the same values."""
    return np.stack([values, values], -1).astype(np.float32)


def agree(found, expected):
    """Returns "yes" for numbers that agree to 0.001, else the largest difference."""
    error = np.abs(np.subtract(found, expected)).max()
    return ["yes" if error < 1e-3 else f"off by {error:.2g}"]


def first(layer, real, of=8):
    """Returns a mask, bool [n]: True for the first examples, False for padding."""
    return layer.array(np.arange(of) < real, "bool")


NORMAL = np.random.default_rng(0).normal(size=512)
FAR = column(*NORMAL + 1e4)
WAVE = column(*np.sin(np.arange(8)))
WAVE *= np.sqrt(0.211 / WAVE.var())


@measured("Running averages", "weight of a new batch", (), momentum=0.9)
def weight(layer):
    """The weight of a new batch in the running mean, for `momentum=0.9` in the library."""
    zero, one = layer.array(column(-1, 1)), layer.array(column(0, 2))
    return layer.used(layer.fit(*[zero] * 200, one))[:1]


@measured("Running averages", "stored variance", (), kept=0.0)
def stored_variance(layer):
    """Whether the sum of n squared deviations is divided by n (biased) or n - 1 (unbiased)."""
    n = round(WAVE.var() * 8 / layer.used(layer.fit(layer.array(WAVE)))[1])
    return [{8: "biased", 7: "unbiased"}[n]]


@measured("Running averages", "first steps", (1, 1, 1))
def first_steps(layer):
    """The variance used in evaluation, divided by the true variance, after 1, 10, 100 steps."""
    x = layer.array(WAVE)
    return [layer.used(layer.fit(*[x] * steps))[1] / WAVE.var() for steps in (1, 10, 100)]


@measured("Running averages", "one value", ("error",))
def one_value(layer):
    """Training with one value per channel, whose variance is always 0."""
    x = layer.array(column(3))
    return [f"output {layer.numpy(layer.train(layer.init(x), x)[0])[0, 0]:g}"]


@measured("Precision", "variance at 10,000", (FAR.var(dtype=np.float64),), kept=0.0)
def variance_at_large_mean(layer):
    """The variance of 512 values with a mean of 10,000."""
    return layer.used(layer.fit(layer.array(FAR)))[1:]


@measured("Precision", "gradients at 1,000", (0, 0, 0), 1e3)
@measured("Precision", "gradients", (0, 0, 0))
@measured("Masks", "NaN in padding", (0, 0, 0), 0, 400)
def gradient_errors(layer, mean=0, real=512, place=lambda array: array):
    """Relative errors of the gradients of x, scale and bias in the second step; padding is NaN."""
    rng, x = np.random.default_rng(1), column(*NORMAL + mean)
    stats = layer.fit(place(layer.array(x)))
    scale, bias, g = rng.normal(size=2), rng.normal(size=2), rng.normal(size=x.shape)
    inverse = 1 / np.sqrt(x[:real].var(0, dtype=np.float64) + EPSILON)
    h = (x - x[:real].mean(0, dtype=np.float64)) * inverse
    x[real:], h[real:], g[real:] = np.nan, 0, 0
    dx = scale * inverse * (g - (g.sum(0) + h * (g * h).sum(0)) / real)
    mask = {"mask": layer.mask(first(layer, real, of=512))} if real < 512 else {}
    output = layer.jit(lambda x, affine: layer.call(affine, stats, x, True, **mask)[0])
    affine = [layer.array(scale), layer.array(bias)]
    found_x, found = layer.vjp(output, place(layer.array(x)), affine)[1](place(layer.array(g)))
    pairs = ((found_x[:real], dx[:real]), (found[0], (g * h).sum(0)), (found[1], g.sum(0)))
    return [np.abs(layer.numpy(a) - b).max() / np.abs(b).max() for a, b in pairs]


@measured("Precision", "bfloat16 layer", (1, "float32"), kept=0.0, dtype="bfloat16")
@measured("Precision", "bfloat16 input", (1, "float32"), kept=0.0)
def in_bfloat16(layer):
    """The output for 260 after training on 258 and 260, and the dtype of the statistics."""
    x = layer.array(column(*[258, 260] * 256), "bfloat16")
    stats = layer.fit(x)
    dtypes = {str(leaf.dtype).removeprefix("torch.") for leaf in jax.tree.leaves(stats)}
    y = layer.numpy(layer.train(stats, x, train=False)[0])
    return [y[1, 0], *(dtype for dtype in dtypes if "float" in dtype)]


@measured("Masks", "mask [n], images", (2, 2), (8, 3, 3, 2), kept=0.0)
@measured("Masks", "one channel", (2, 2), (8, 1), kept=0.0)
@measured("Masks", "mask", (2, 2), (8, 2), kept=0.0)
def masked(layer, shape):
    """Mean and variance of the values 0 to 4; 5 to 7 are masked. Mask [n]: one value per image."""
    x = np.broadcast_to(np.arange(8.0).reshape(8, *[1] * (len(shape) - 1)), shape)
    mask = first(layer, 5) if len(shape) > 2 else layer.mask(first(layer, 5))
    return layer.used(layer.fit(layer.array(x), mask=mask), shape[-1])


@measured("Shards", "empty shard", (1.5, 1.25), 4, kept=0.0, axis_name="x")
@measured("Shards", "masked shards", (2, 2), 5, kept=0.0, axis_name="x")
@measured("Shards", "shards", (3.5, 5.25), 8, kept=0.0, axis_name="x")
def over_shards(layer, real):
    """Mean and variance of 0 to 7, 0 to 4, 0 to 3 in two shards; other values are masked."""
    x = layer.array(column(*range(8)).reshape(2, 4, 2))
    stats, mask = layer.init(x[0]), first(layer, real).reshape(2, 4)

    def train(x, mask):
        return layer.train(stats, x, **{"mask": layer.mask(mask)} if real < 8 else {})[1]

    new = layer.vmap(train, axis_name="x")(x, mask)
    return layer.used(jax.tree.map(lambda leaf: leaf[0], new))


GROUPS = [[0, 7], [1, 2, 3, 4, 5, 6]]


@measured("Shards", "unequal groups", (7.5,), kept=0.0, axis_name="x", axis_index_groups=GROUPS)
def unequal_groups(layer):
    """Mean over a group of six devices under pmap; two other devices form a second group."""
    x = layer.array(column(*range(16)).reshape(8, 2, 2))
    stats = layer.init(x[0])
    new = jax.pmap(lambda x: layer.train(stats, x)[1], axis_name="x")(x)
    return layer.used(jax.tree.map(lambda leaf: leaf[1], new))[:1]


@measured("Transformations", "vmap", ("yes",))
def under_vmap(layer):
    """Whether three replicas under vmap give the same results as separate training."""
    xs = [layer.array(WAVE + i) for i in range(3)]
    stats = jax.tree.map(lambda *leaves: layer.stack(leaves), *map(layer.fit, xs))
    new = layer.vmap(lambda stats, x: layer.train(stats, x)[1])(stats, layer.stack(xs))
    found = [layer.used(jax.tree.map(lambda leaf, i=i: leaf[i], new)) for i in range(3)]
    return agree(found, [layer.used(layer.fit(x, x)) for x in xs])


@measured("Transformations", "scan", ("yes",))
def under_scan(layer):
    """Whether five steps under lax.scan give the same results as a Python loop."""
    xs = [layer.array(WAVE + i) for i in range(5)]
    stats, _ = jax.lax.scan(
        lambda stats, x: (layer.train(stats, x)[1], None), layer.init(xs[0]), layer.stack(xs)
    )
    return agree(layer.used(stats), layer.used(layer.fit(*xs)))


@measured("Transformations", "Explicit mesh", ("yes",), kept=0.0)
def explicit_mesh(layer):
    """Whether a sharded batch under jit gives the statistics and gradients of the whole batch."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place, x = functools.partial(jax.device_put, device=PartitionSpec("data")), column(*NORMAL)
        found = layer.used(layer.fit(place(layer.array(x))))
        return agree([*found, *gradient_errors(layer, place=place)], [x.mean(), x.var(), 0, 0, 0])


def cell(kind, truth, function, arguments, options):
    """Returns a cell's text, bold where it differs from float64 by over 1 %, and any error."""
    try:
        values = function(kind(**options), *arguments)
    except Exception as error:  # whatever a library raises, is what the cell says
        message = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
        if match := re.search(r"(unexpected keyword argument |Unrecognized .*\{)'(\w+)'", message):
            return f"no `{match[2]}`", ""
        if re.search(r"torch\.(Tensor|float32)", message):
            return "not JAX", ""
        message = textwrap.shorten(f"{type(error).__name__}: {message}", 160, placeholder=" …")
        return f"`{type(error).__name__}`", f"`{message}`"
    right = all(
        value == true if isinstance(value, str) else np.isclose(value, true, rtol=0.01, atol=1e-3)
        for value, true in zip(values, truth or values, strict=True)
    )
    text = ", ".join(map(as_text, values))
    return text if right else f"**{text}**", ""


def as_text(value):
    """Returns three digits, or one where a number is tiny."""
    if isinstance(value, str):
        return value
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def tables():
    """Returns the Markdown of all tables."""
    there = [kind for kind in LIBRARIES if kind.there]
    missing = [kind.title for kind in LIBRARIES if not kind.there]
    lines = [f"JAX {jax.__version__}, {jax.default_backend().upper()}."]
    lines += [f"Not installed: {', '.join(missing)}."] * bool(missing)
    errors = []
    for section, columns in COLUMNS.items():
        meanings = {}
        for title, _, function, *_ in columns:
            meanings.setdefault(function.__doc__, []).append(f"**{title}**")
        lines += ["", f"## {section}", ""]
        lines += (f"* {', '.join(titles)}: {text}" for text, titles in meanings.items())
        rows = [["", *(title for title, *_ in columns)], ["---"] * (len(columns) + 1)]
        rows += [["float64", *(", ".join(map(as_text, truth)) for _, truth, *_ in columns)]]
        for kind in there:
            rows.append([f"{kind.title} {version(kind.package)}"])
            for title, *measurement, options in columns:
                text, error = cell(kind, *measurement, options)
                text += f"[^{kind.package}]" if title in kind.documented else ""
                if error:
                    errors += [error] * (error not in errors)
                    text += f"[^{errors.index(error) + 1}]"
                for name, value in kind.offers.get(title, {}).items():
                    other, _ = cell(kind, *measurement, options | {name: value})
                    text += f"; `{name}={value}`: {other}"
                rows[-1].append(text)
        lines += ["", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += ["", *(f"[^{number}]: {error}" for number, error in enumerate(errors, 1))]
    wrap = textwrap.TextWrapper(100, subsequent_indent="    ", break_long_words=False).fill
    return "".join(f"{line if '|' in line else wrap(line)}\n" for line in lines)


def main():
    """Prints the tables, and puts them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replaces the tables there")
    page, text = parser.parse_args().write, tables()
    print(text)
    if page:
        marks = "<!-- tables -->\n", "<!-- end of tables -->\n"
        before, after = re.split(f"{marks[0]}.*{marks[1]}", page.read_text(), flags=re.DOTALL)
        page.write_text(before + marks[0] + text + marks[1] + after)


if __name__ == "__main__":
    main()
