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
import re
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
OptionalNumber = Annotated[float | None, _flag_value(float, "X", "a number")]
Name = Annotated[str, _flag_value(str, "NAME", "a word")]
Word = Annotated[str | None, _flag_value(str, "NAME", "a word")]
Address = Annotated[str | None, _flag_value(str, "HOST:PORT", "an address")]
Directory = Annotated[str | None, _flag_value(str, "DIR", "a directory")]

DEFAULT_RATIOS = (0.5, 0.75, 0.97)
_LARGE_SIDE = 224

# Epochs of the paper's recipe, and enough of them for the digits set.
DEFAULT_EPOCHS = {
  "cifar100": 450,
  "cifar10": 350,
  "svhn": 50,
  "imagenet": 100,
  "folder": 100,
  "digits": 40,
}

# What --variant may be of each network but the CIFAR ResNet, whose is --depth.
VARIANTS = {
  "densenet": ("12/100", "24/250", "40/190"),
  "imagenet_resnet": (
    "18",
    "34",
    "50",
    "101",
    "152",
    "resnext50",
    "resnext101",
    "wide50",
    "wide101",
  ),
  "efficientnet": tuple(f"b{number}" for number in range(8)),
}


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

  # Which family of networks: resnet (for small images, see depth), densenet,
  # imagenet_resnet (ResNet, ResNeXt, Wide ResNet), efficientnet, or
  # MODULE:FUNCTION, your own (docs/your_own_network.md).
  network: Name = "resnet"

  # Layers of the resnet: 20, 32, 44, 56, 110, 1202 or any other 6n + 2.
  depth: Integer = 110

  # Which of the other networks: 12/100, 24/250 or 40/190 (densenet: growth and
  # depth, any other depth 6n + 4); 18, 34, 50, 101, 152, resnext50,
  # resnext101, wide50 or wide101 (imagenet_resnet); b0 to b7 (efficientnet).
  variant: Word = None

  # Which images: cifar100, cifar10, svhn, imagenet, folder (any image folder,
  # DIR/train/CLASS/*, DIR/val/CLASS/*) or digits (8x8, embedded).
  dataset: Literal[
    "cifar100", "cifar10", "svhn", "imagenet", "folder", "digits"
  ] = "cifar100"

  # Directory, or gs://BUCKET/FOLDER, with a TFDS-prepared set, the official
  # archive or files, or an image folder.
  data_dir: Directory = None

  # Pixels of a side of what networks are given. If not set, 224 for
  # efficientnet and for imagenet and folder, else those that the set has.
  # Small images are enlarged inside the step.
  image_size: OptionalInteger = None

  # Zero pixels around an image before a random part of it is taken; if not
  # set, 4 of 32. For sets of small images.
  crop_padding: OptionalInteger = None

  # How large images are varied: random_resized (a random part, scaled) or
  # rotated (the EKD paper's: scaled, turned by up to 10 degrees, shifted).
  crop: Literal["random_resized", "rotated"] = "random_resized"

  # Classes of an image folder; counted if not set.
  num_classes: OptionalInteger = None

  # Pass over image files that cannot be used, and count them.
  skip_broken: bool = False

  # Processes that read large images; if not set, one per processor core.
  workers: OptionalInteger = None

  # Fetch the official archive into the data directory if it is not there.
  download: bool = False

  # Use the first N training images only; all if not set.
  train_examples: OptionalInteger = None

  # Hold out the last N training images; the best epoch on them is reported
  # beside the last one.
  validation_examples: Integer = 0

  # Passes over the training images; if not set, those of the recipe: cifar100
  # 450, cifar10 350, svhn 50, imagenet and folder 100, digits 40.
  epochs: OptionalInteger = None

  # Images per step, over all devices.
  batch_size: Integer = 128

  # Micro-batches that a step takes its images in, one after the other: less
  # memory. Batch norm then sees a micro-batch at a time.
  accumulate: Integer = 1

  # Images per evaluation step, over all devices.
  evaluation_batch_size: Integer = 500

  # Epochs between evaluations on the test set.
  evaluate_every: Integer = 1

  # Nesterov SGD, or RMSProp (decay 0.9) as EfficientNets are trained with.
  optimizer: Literal["nesterov", "rmsprop"] = "nesterov"

  # Learning rate at the start.
  learning_rate: Number = 0.1

  # Fractions of the training at which the learning rate drops.
  learning_rate_drops: Numbers = (0.5, 0.75)

  # Epochs from drop to drop, instead of those fractions.
  learning_rate_drop_every: OptionalNumber = None

  # What each drop multiplies the learning rate by.
  learning_rate_drop_factor: Number = 0.1

  # Learning rate of the adapters, as a multiple of the learning rate.
  adapter_learning_rate: Number = 0.5

  # Momentum, in [0, 1).
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

  # Keep less for the gradient. On a CPU about half the memory, and steps that
  # take 5 to 10 % longer; with --conv lax, for accelerators, blocks are
  # computed twice. Nothing changes in the loops of --scan.
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

  # With --plan: compile the step too, and print the memory that it takes.
  compile: bool = False


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
    "compile",
    "workers",
    "skip_broken",
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
  if config.image_size is None:
    info = data.info(config.dataset)
    large = info.streamed or config.network == "efficientnet"
    side = _LARGE_SIDE if large else info.image_shape[0]
    config = dataclasses.replace(config, image_size=side)
  if config.data_dir is not None:
    data_dir = _absolute("data_dir", config.data_dir)
    config = dataclasses.replace(config, data_dir=data_dir)
  if data.info(config.dataset).streamed:
    config = _with_counts(config)
  run_dir = config.run_dir
  if run_dir is None:
    run_dir = str(pathlib.Path("runs") / _run_name(config))
  return dataclasses.replace(config, run_dir=_absolute("run_dir", run_dir))


def _with_counts(config: Config) -> Config:
  """With what only the files can tell of a streamed set, so that config.json
  says it: a run that goes on with other files is refused.
  """
  if config.data_dir is None and config.dataset != "folder":
    return config  # It may only be planned.
  train, _, classes = data.large.find(config.dataset, config.data_dir)
  examples = data.count_training_examples(
    config.dataset,
    len(train),
    train_examples=config.train_examples,
    validation_examples=config.validation_examples,
  )
  config = dataclasses.replace(config, train_examples=examples)
  if config.dataset != "folder" or config.num_classes is not None:
    return config
  return dataclasses.replace(config, num_classes=classes)


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
  if config.network != "resnet":
    words = filter(None, (config.network, config.variant))
    network = re.sub(r"[/:.]", "-", "-".join(words))
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
    "accumulate",
    "image_size",
  ):
    require(name, lambda n: n >= 1, "a whole number of at least 1")
  for name in (
    "validation_examples",
    "seed",
    "seeds",
    "process_id",
    "workers",
    "crop_padding",
  ):
    require(name, lambda n: n >= 0, "a whole number of at least 0")
  for name in ("seed", "seeds"):
    require(name, lambda n: n < 2**32, "below 2^32")
  require("num_classes", lambda n: n >= 2, "a whole number of at least 2")
  for name in (
    "learning_rate",
    "learning_rate_drop_every",
    "temperature",
    "checkpoint_minutes",
  ):
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
  if config.compile and not config.plan:
    raise UserError(
      "--compile was given without --plan: a training compiles anyway, leave "
      "it out"
    )
  if config.with_solo and config.method == "solo":
    raise UserError(
      "--with-solo was given with --method solo: the members are alone "
      "already, leave --with-solo out"
    )
  _check_network(config)
  _check_data(config)
  _check_processes(config)


def _check_network(config: Config) -> None:
  own = re.fullmatch(r"[\w.]+:\w+", config.network)
  if config.network == "resnet" or own:
    if config.variant is not None:
      raise UserError(
        f"--variant {config.variant} was given with --network "
        f"{config.network}, which has none: leave it out"
        + ("" if own else ", --depth says which")
      )
    return
  if config.network not in VARIANTS:
    near = nearest(config.network, ["resnet", *VARIANTS])
    meant = f" (did you mean {near}?)" if near else ""
    raise UserError(
      f"--network {config.network} is not known{meant}: use one of resnet, "
      f"{', '.join(VARIANTS)}, or MODULE:FUNCTION"
    )
  allowed = VARIANTS[config.network]
  variant = config.variant
  if config.network == "densenet" and variant is not None:
    numbers = re.fullmatch(r"(\d{1,3})/(\d{1,4})", variant)
    if numbers and int(numbers[1]) >= 1:
      depth = int(numbers[2])
      if depth >= 10 and depth % 6 == 4:
        return
  elif variant in allowed:
    return
  given = "is missing" if variant is None else f"is {variant}"
  raise UserError(
    f"--variant {given}: {config.network} is one of {', '.join(allowed)}"
    + (", or any GROWTH/DEPTH with depth 6n + 4" if "/" in allowed[0] else "")
  )


def _check_data(config: Config) -> None:
  """Refuses options that are for another kind of data set."""
  streamed = data.info(config.dataset).streamed
  if streamed and config.crop_padding is not None:
    raise UserError(
      f"--crop-padding was given with --dataset {config.dataset}: it is for "
      "sets of small images, --crop says how large ones are varied"
    )
  if streamed and config.download:
    raise UserError(
      f"--download was given with --dataset {config.dataset}, which cannot "
      "be fetched: put it into --data-dir"
    )
  if config.num_classes is not None and config.dataset != "folder":
    raise UserError(
      f"--num-classes was given with --dataset {config.dataset}, whose "
      "classes are known: leave it out"
    )
  if streamed:
    return
  for name, given in (
    ("crop", config.crop != "random_resized"),
    ("skip_broken", config.skip_broken),
    ("workers", config.workers is not None),
  ):
    if given:
      raise UserError(
        f"{flag(name)} was given with --dataset {config.dataset}, which is "
        "read whole: it is for folder and imagenet, leave it out"
      )


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
