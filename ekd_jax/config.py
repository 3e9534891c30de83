"""Every option of a run, as one frozen dataclass.

Each field is a command-line flag; the comment above it is its help text.
Fields that default to None are filled in by `resolve`, so that a run
directory's config.json says what was really used.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro

from ekd_jax import data
from ekd_jax.errors import UserError


def _flag_value(
  read: Callable[[str], Any], metavar: str, wanted: str
) -> tyro.constructors.PrimitiveConstructorSpec:
  """How a flag's one word becomes a value, which may also be unset."""

  def from_words(words: list[str]) -> Any:
    try:
      return read(words[0])
    except ValueError:
      raise ValueError(f"{words[0]!r} is not {wanted}") from None

  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=metavar,
    instance_from_str=from_words,
    is_instance=lambda value: True,
    str_from_instance=lambda value: [_shown(value)],
  )


def _list_of(number: type) -> Callable[[str], tuple[Any, ...]]:
  return lambda word: tuple(number(part) for part in word.split(","))


def _shown(value: Any) -> str:
  if isinstance(value, tuple):
    return ",".join(map(_shown, value))
  if value is None:
    return "not set"
  return f"{value:g}" if isinstance(value, float) else str(value)


# A list is one comma-separated word: 0.5,0.75,0.97.
Numbers = Annotated[
  tuple[float, ...] | None,
  _flag_value(_list_of(float), "X,X,...", "a comma-separated list of numbers"),
]
Integers = Annotated[
  tuple[int, ...] | None,
  _flag_value(
    _list_of(int), "N,N,...", "a comma-separated list of whole numbers"
  ),
]
Integer = Annotated[int, _flag_value(int, "N", "a whole number")]
Number = Annotated[float, _flag_value(float, "X", "a number")]
OptionalInteger = Annotated[int | None, _flag_value(int, "N", "a whole number")]
Address = Annotated[str | None, _flag_value(str, "HOST:PORT", "an address")]
Directory = Annotated[str | None, _flag_value(str, "DIR", "a directory")]

DEFAULT_RATIOS = (0.5, 0.75, 0.97)

# Epochs of the paper's recipe, and enough of them for the digits set.
DEFAULT_EPOCHS = {"cifar100": 450, "cifar10": 350, "digits": 40}


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of a training run."""

  # How members are trained: ekd (online ensemble distillation), dml (deep
  # mutual learning), solo (each alone).
  method: Literal["ekd", "solo", "dml"] = "ekd"

  # Fraction of the full network's parameters that each student lacks, for
  # example 0.5,0.75,0.97 (which is also used if neither this nor widths are
  # set); each in (0, 1). The full network is always trained too.
  ratios: Numbers = None

  # Channel multipliers instead of ratios, the full network (1) first, for
  # example 1,.8,.6,.4,.2.
  widths: Numbers = None

  # Layers of the ResNet: 20, 32, 44, 56, 110, 1202 or any other 6n + 2.
  depth: Integer = 110

  # Which images: cifar100, cifar10, or digits (8x8, embedded).
  dataset: Literal["cifar100", "cifar10", "digits"] = "cifar100"

  # Directory, or gs://BUCKET/FOLDER, with a TFDS-prepared set, the official
  # binary archive, or its unpacked folder.
  data_dir: Directory = None

  # Fetch the official archive into the data directory if it is not there.
  download: bool = False

  # Use the first N training images only; all if not set.
  train_examples: OptionalInteger = None

  # Hold out the last N training images; the best epoch on them is reported
  # beside the last one.
  validation_examples: Integer = 0

  # Passes over the training images; if not set, those of the recipe: cifar100
  # 450, cifar10 350, digits 40.
  epochs: OptionalInteger = None

  # Images per step, over all devices.
  batch_size: Integer = 128

  # Images per evaluation step, over all devices.
  evaluation_batch_size: Integer = 500

  # Epochs between evaluations on the test set.
  evaluate_every: Integer = 1

  # Learning rate at the start.
  learning_rate: Number = 0.1

  # Fractions of the training at which the learning rate drops.
  learning_rate_drops: Numbers = (0.5, 0.75)

  # What each drop multiplies the learning rate by.
  learning_rate_drop_factor: Number = 0.1

  # Learning rate of the adapters, as a multiple of the learning rate.
  adapter_learning_rate: Number = 0.5

  # Nesterov momentum, in [0, 1).
  momentum: Number = 0.9

  # Weight decay of all parameters, batch norm and adapters included.
  weight_decay: Number = 1e-4

  # Temperature of the distillation term (ekd).
  temperature: Number = 2.0

  # Weight of the cross-entropy terms (ekd).
  label_weight: Number = 0.7

  # Weight of the block feature terms (ekd).
  feature_weight: Number = 0.15

  # Weight of the terms towards the ensemble's logits (ekd).
  distill_weight: Number = 0.15

  # Which members train the shared stem (ekd): all of them, or the first only.
  base_gradients: Literal["all", "first"] = "all"

  # Batch statistics of the global batch, or of each device's share.
  batch_norm: Literal["global", "local"] = "global"

  # Compute type of convolutions and maps; losses, statistics and the
  # optimizer are float32 in any case.
  precision: Literal["float32", "bfloat16"] = "float32"

  # How convolutions are computed: lax (XLA's own, for GPU and TPU), split
  # (faster on a CPU), or auto, which chooses by the platform. The same
  # parameters and, but for rounding, the same numbers.
  conv: Literal["auto", "lax", "split"] = "auto"

  # Seed of everything random.
  seed: Integer = 0

  # Train once per seed, for example 0,1,2, into RUN_DIR/seed_0 ..., and
  # report means and standard deviations.
  seeds: Integers = None

  # Where the run is kept, a directory or gs://BUCKET/FOLDER; the same command
  # again resumes it. If not set, runs/NAME, with a name made from the options.
  run_dir: Directory = None

  # Also train each student alone, same budget, so that the gain is in the
  # report.
  with_solo: bool = False

  # Minutes between checkpoints; one is also saved at each epoch's end.
  checkpoint_minutes: Number = 10.0

  # Steps between the lines of metrics.jsonl.
  log_every: Integer = 50

  # Compile the equal blocks of a stage once and loop over them: the least
  # memory, a quicker start, and steps that take a quarter longer. auto does so
  # for very deep networks.
  scan: Literal["auto", "on", "off"] = "auto"

  # Keep less for the gradient: about half the memory, and steps that take 5 to
  # 10 % longer. For --conv split; nothing changes in the loops of --scan.
  remat: bool = False

  # Do not keep compiled programs in the user's cache directory. (The variable
  # JAX_COMPILATION_CACHE_DIR names another directory.)
  compilation_cache: bool = True

  # Leave the C library's allocator as it is; by default, on a CPU with glibc,
  # it is told to keep freed memory, which makes steps faster.
  tune_allocator: bool = True

  # One training on several hosts: give the same command to each. On Cloud TPU
  # VMs and with Slurm nothing else is needed.
  distributed: bool = False

  # Where process 0 can be reached; with the next two, where JAX cannot find
  # them out.
  coordinator_address: Address = None

  # How many processes there are.
  num_processes: OptionalInteger = None

  # Which of them this is, from 0. The first reads and writes the run directory.
  process_id: OptionalInteger = None

  # Seconds to wait for the other processes.
  join_timeout: Integer = 300

  # The embedded digits set, a shallow network, minutes on a laptop.
  quick: bool = False

  # Print what would be trained, and stop.
  plan: bool = False


# Fields that do not change what is trained: they may differ on resume.
_FREE_ON_RESUME = frozenset(
  {
    "data_dir",
    "download",
    "run_dir",
    "with_solo",
    "checkpoint_minutes",
    "log_every",
    "conv",
    "scan",
    "remat",
    "compilation_cache",
    "tune_allocator",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
    "join_timeout",
    "quick",
    "plan",
  }
)


def training_fields(config: Config) -> dict[str, Any]:
  """The options that decide what is trained, as JSON values."""
  return {
    name: value
    for name, value in to_json(config).items()
    if decides_training(name)
  }


def decides_training(name: str) -> bool:
  """Whether an option decides what is trained, and not only how or where."""
  return name not in _FREE_ON_RESUME


def to_json(config: Config) -> dict[str, Any]:
  """The config as config.json holds it."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(values: dict[str, Any]) -> Config:
  """The config that `to_json` wrote.

  Raises:
    UserError: it was written by a newer version, or by something else.
  """
  known = {field.name for field in dataclasses.fields(Config)}
  if unknown := sorted(values.keys() - known):
    raise UserError(
      f"it has options that are not known here ({', '.join(unknown)}): it is "
      "of a newer version of ekd_jax, use that one"
    )
  config = Config(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in values.items()
    }
  )
  try:
    _check_values(config)
  except TypeError as error:
    raise UserError(f"its values have other types ({error})") from error
  return config


def resolve(config: Config) -> Config:
  """Checks a config and fills in what is derived.

  Args:
    config: as the command line gave it.

  Returns:
    A config without open choices: ratios or widths, epochs, absolute paths.

  Raises:
    UserError: a value that cannot be used.
  """
  _check_values(config)
  if config.ratios is None and config.widths is None:
    config = dataclasses.replace(config, ratios=DEFAULT_RATIOS)
  if config.epochs is None:
    epochs = DEFAULT_EPOCHS[config.dataset]
    config = dataclasses.replace(config, epochs=epochs)
  if config.data_dir is not None:
    data_dir = _absolute("data_dir", config.data_dir)
    config = dataclasses.replace(config, data_dir=data_dir)
  run_dir = config.run_dir
  if run_dir is None:
    run_dir = str(pathlib.Path("runs") / _run_name(config))
  return dataclasses.replace(config, run_dir=_absolute("run_dir", run_dir))


def nearest(word: str, allowed: Sequence[str]) -> str | None:
  """The allowed word that `word` most looks like, if any does."""
  found = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
  return found[0] if found else None


def flag(name: str) -> str:
  """The command-line flag of a field."""
  return "--" + name.replace("_", "-")


def _absolute(name: str, where: str) -> str:
  """A path that means the same from another working directory."""
  if not where or "\0" in where:
    raise UserError(f"{flag(name)} is {where!r}: name a directory")
  scheme, separator, rest = where.partition("://")
  if not separator:
    try:
      return str(pathlib.Path(where).expanduser().absolute())
    except RuntimeError as error:
      raise UserError(f"{flag(name)} is {where}: {error}") from error
  if scheme != "gs":
    raise UserError(
      f"{flag(name)} is {where}: use a directory or gs://BUCKET/FOLDER"
    )
  bucket, _, folder = rest.partition("/")
  if not bucket or not folder.strip("/"):
    raise UserError(
      f"{flag(name)} is {where}: name a bucket and a folder in it, "
      "gs://BUCKET/FOLDER"
    )
  return where.rstrip("/")


def _run_name(config: Config) -> str:
  fields = json.dumps(training_fields(config), sort_keys=True)
  digest = hashlib.sha256(fields.encode())
  network = f"resnet{config.depth}"
  return f"{config.dataset}-{network}-{config.method}-{digest.hexdigest()[:6]}"


def _check_values(config: Config) -> None:
  def require(name: str, accepted: Callable[[Any], bool], allowed: str) -> None:
    value = getattr(config, name)
    if value is None:
      return
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(math.isfinite(n) and accepted(n) for n in numbers):
      raise UserError(f"{flag(name)} is {_shown(value)}: must be {allowed}")

  for name in (
    "epochs",
    "train_examples",
    "batch_size",
    "log_every",
    "evaluation_batch_size",
    "evaluate_every",
    "num_processes",
    "join_timeout",
  ):
    require(name, lambda n: n >= 1, "a whole number of at least 1")
  for name in ("validation_examples", "seed", "seeds", "process_id"):
    require(name, lambda n: n >= 0, "a whole number of at least 0")
  for name in ("seed", "seeds"):
    require(name, lambda n: n < 2**32, "below 2^32")
  for name in ("learning_rate", "temperature", "checkpoint_minutes"):
    require(name, lambda n: n > 0, "a number above 0")
  for name in (
    "weight_decay",
    "label_weight",
    "feature_weight",
    "distill_weight",
    "adapter_learning_rate",
  ):
    require(name, lambda n: n >= 0, "a number of at least 0")
  require("momentum", lambda n: 0 <= n < 1, "a number in [0, 1)")
  require(
    "learning_rate_drop_factor", lambda n: 0 < n <= 1, "a number in (0, 1]"
  )
  require(
    "learning_rate_drops",
    lambda n: 0 < n < 1,
    "fractions of the training, each in (0, 1)",
  )
  require(
    "depth",
    lambda n: 8 <= n <= 10_000 and (n - 2) % 6 == 0,
    "6n + 2 and at most 10000: 8, 14, 20, 32, 44, 56, 110, 1202, ...",
  )
  require(
    "ratios",
    lambda n: 0 < n < 1,
    "fractions of parameters to remove, each above 0 and below 1",
  )
  require(
    "widths",
    lambda n: 0 < n <= 1,
    "channel multipliers, each above 0 and at most 1",
  )
  for name in ("ratios", "widths", "seeds", "learning_rate_drops"):
    values = getattr(config, name) or ()
    if len(set(values)) < len(values):
      raise UserError(f"{flag(name)} is {_shown(values)}: give each value once")
  if config.ratios is not None and config.widths is not None:
    raise UserError(
      "--ratios and --widths were both given: they say the same thing in two "
      "ways, leave one out"
    )
  if config.widths is not None and config.widths[0] != 1:
    raise UserError(
      f"--widths starts with {config.widths[0]:g}: the full network, 1, must "
      "come first"
    )
  if config.with_solo and config.method == "solo":
    raise UserError(
      "--with-solo was given with --method solo: the members are alone "
      "already, leave --with-solo out"
    )
  _check_processes(config)
  data.info(config.dataset)


def _check_processes(config: Config) -> None:
  given = {
    flag(name): getattr(config, name)
    for name in ("coordinator_address", "num_processes", "process_id")
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return
  if not config.distributed:
    present = next(name for name in given if name not in missing)
    raise UserError(f"{present} was given without --distributed: add that")
  if missing:
    raise UserError(
      f"{', '.join(missing)} is missing: give all of {', '.join(given)}, or "
      "none of them where JAX can find them out"
    )
  host, _, port = config.coordinator_address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(
      f"--coordinator-address is {config.coordinator_address}: must be "
      "HOST:PORT, such as 10.0.0.2:8476"
    )
  if config.process_id >= config.num_processes:
    raise UserError(
      f"--process-id is {config.process_id} of --num-processes "
      f"{config.num_processes}: must be 0 to {config.num_processes - 1}"
    )
