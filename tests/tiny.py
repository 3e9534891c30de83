"""Whole runs in about a second: a method of linear members on few digits.

The loop knows a method by its interface only, so what is tested with this one
holds for every other. Its step uses everything that a step may: state that is
not parameters, an optimizer with momentum, random numbers.
"""

import functools
import io
import shlex

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from ekd_jax import build, data
from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.methods import Method, Student, update
from ekd_jax.training import loop, optimizers
from ekd_jax.training.stopping import StopRequest

# Three steps an epoch; fourteen images are left over.
OPTIONS = {
  "dataset": "digits",
  "depth": 8,
  "ratios": (0.5,),
  "epochs": 2,
  "batch_size": 32,
  "train_examples": 110,
  "learning_rate": 0.02,
  "log_every": 1,
}
FLAGS = shlex.split(
  "--dataset digits --depth 8 --ratios .5 --epochs 2 --batch-size 32 "
  "--train-examples 110 --learning-rate .02 --log-every 1"
)
STEPS_PER_EPOCH = 3

# Saves after every step.
ALWAYS = 1e-9


def config(run_dir, **options):
  """A resolved config."""
  return configs.resolve(Config(**OPTIONS | options, run_dir=str(run_dir)))


def method(config, total_steps):
  """Softmax regression on the pixels, once per member: `build.method`."""
  classes = data.info(config.dataset).num_classes
  names = [member.name for member in build.members(config)]
  optimizer = optimizers.nesterov_sgd(
    build.schedule(config, total_steps),
    momentum=config.momentum,
    weight_decay=config.weight_decay,
    adapter_multiplier=1.0,
  )

  def pixels(images):
    return images.reshape(len(images), -1)

  def init(rng, batch):
    shape = (pixels(batch["image"]).shape[1], classes)
    params = {
      name: {
        "kernel": 0.05 * jax.random.normal(jax.random.fold_in(rng, i), shape),
        "bias": jnp.zeros(classes),
      }
      for i, name in enumerate(names)
    }
    return update.init_state(params, jnp.zeros(shape[0]), optimizer)

  def logits(params, mean, images):
    centred = pixels(images) - mean
    return {
      name: centred @ params[name]["kernel"] + params[name]["bias"]
      for name in names
    }

  def train_step(state, batch, rng):
    def loss_function(params, mean, batch, rng):
      noise = 0.1 * jax.random.normal(rng, (classes,))
      mean = 0.9 * mean + 0.1 * pixels(batch["image"]).mean(0)
      outputs = logits(params, mean, batch["image"])
      terms = {
        f"label/{name}": (
          optax.losses.softmax_cross_entropy_with_integer_labels(
            values + noise, batch["label"]
          ).mean()
        )
        for name, values in outputs.items()
      }
      metrics = update.classification_metrics(outputs, batch["label"])
      loss = sum(terms.values())
      return loss, (mean, {"loss": loss, **terms, **metrics})

    return update.gradient_step(
      state, batch, rng, loss_function, optimizer, dict
    )

  def predict(state, images):
    return update.with_ensemble(
      logits(state["params"], state["batch_stats"], images)
    )

  def students(state):
    return {name: Student(None, state["params"][name]) for name in names}

  return Method(init, train_step, predict, students)


@functools.cache
def _digits():
  return data.load("digits")


def train(config, stop=None):
  """Trains with whatever `build.method` is; returns what the console got."""
  dataset = data.restrict(
    _digits(),
    train_examples=config.train_examples,
    validation_examples=config.validation_examples,
  )
  shown = io.StringIO()
  loop.train(
    config,
    dataset,
    argv=["train"],
    console=Console(file=shown),
    title="tiny",
    stop=stop or StopRequest(),
  )
  return shown.getvalue()
