"""What is looked at in a run beside its metrics: the model's graph, histograms, and a few predictions."""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from bnjax.arrays import BatchStats
from bnjax.data.datasets import Dataset, Split
from bnjax.train.build import Experiment
from bnjax.train.config import default_config
from bnjax.train.graph import graph_def, nodes
from bnjax.train.histograms import sample, summarise
from bnjax.train.parsing import flat
from bnjax.train.tensorboard import contact_sheet
from bnjax.train.writers import RunWriter
from bnjax.train.xla import compiler_options
from bnjax.train_step import TrainState, predict_step


class Watch:
    """Looks at networks between the steps of their training, which it leaves as it is."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        """Chooses the images, spread evenly over each split; nothing is compiled before the first look."""
        self._classes = dataset.classes
        self._train, self._test = (
            _spread(dataset.train, experiment.histograms),
            _spread(dataset.test, experiment.pictures),
        )
        self._model, self._shape = (
            experiment.model,
            (experiment.batch_size, *dataset.train.image.shape[1:]),
        )
        self._sample = jax.jit(
            functools.partial(sample, model=experiment.model), compiler_options=compiler_options()
        )
        self._predict = jax.jit(
            functools.partial(predict_step, model=experiment.model),
            compiler_options=compiler_options(),
        )

    def begin(self, writer: RunWriter, config: ConfigDict) -> None:
        """Shows the graph of the model and the hyperparameters."""
        writer.board.graph(graph_def(nodes(self._model, self._shape)))
        values, standard = flat(config.to_dict()), flat(default_config().to_dict())
        # TensorBoard shows the first few columns: what is special about this run.
        writer.board.hyperparameters(
            dict(sorted(values.items(), key=lambda item: item[1] == standard[item[0]]))
        )

    def look(
        self, writer: RunWriter, step: int, state: TrainState, batch_stats: BatchStats
    ) -> None:
        """Records the histograms and the predictions after so many steps."""
        if len(self._train.label):
            batch = {"image": self._train.image, "label": self._train.label}
            writer.histograms(
                step, summarise(jax.device_get(self._sample(state, batch_stats, batch)))
            )
        if len(self._test.label):
            predicted = jax.device_get(self._predict(state.params, batch_stats, self._test.image))
            writer.pictures(step, self._sheet(predicted["class"], predicted["score"].max(-1)))

    def _sheet(self, predicted: np.ndarray, score: np.ndarray) -> np.ndarray:
        wrong = predicted != self._test.label
        captions = [
            f"{self._classes[guess]} {certain:.2f}"
            + (f"\nnot {self._classes[truth]}" if guess != truth else "")
            for guess, certain, truth in zip(predicted, score, self._test.label, strict=True)
        ]
        return contact_sheet(self._test.image, captions, wrong.tolist())


def _spread(split: Split, count: int) -> Split:
    """Returns so many examples at equal distances: a split may be sorted by class."""
    chosen = np.arange(count) * len(split.label) // max(count, 1)
    return Split(split.image[chosen], split.label[chosen])
