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
Words = Annotated[
  tuple[str, ...],
  _flag_value(
    lambda word: tuple(word.split(",")), "NAME,NAME,...", "a list of words"
  ),
]
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
  "densenet": ("12/100", "24/250", "40/190", "12/40-unnormalized"),
  "plain_densenet": ("12/40",),
  "wide_resnet": ("16-2", "40-2", "28-10"),
  "bottleneck_resnet": ("110", "wide20-8"),
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


# Options that say who is trained; one at most is set.
MEMBERS = ("ratios", "widths", "peers", "partners")

# The temperature of each method that has one.
TEMPERATURES = {"ekd": 2.0, "dml": 1.0, "ffl": 3.0, "pcl": 3.0, "ffsd": 2.0}

# How many equal networks a method trains if nobody says what else: published
# as such, not as a way to compress. (The one of ffsd is the leader.)
_PEERS = {"ffl": 2, "pcl": 3, "ffsd": 1}
_COMMON_STUDENTS = 2

# The part of a training over which a method's terms grow: 80 and 5 epochs of
# 300.
_RAMP_UP = {"ffl": 80 / 300, "pcl": 80 / 300, "ffsd": 5 / 300}

# Options that only some methods have; not set, they are for any.
METHODS_OF = {
  "partners": ("ffl", "pcl", "dml", "solo"),
  "ramp_up_epochs": ("ffl", "pcl", "ffsd"),
  "views": ("pcl",),
  "common_students": ("ffsd",),
}


# Networks of which there is one only, but for the resnet's depth.
_SINGLE = ("resnet", "vgg16", "googlenet")

# What else --variant may be: numbers in a form, and what one of them is.
_OTHER_VARIANTS = {
  "densenet": (
    r"[1-9]\d{0,2}/(?P<depth>\d{2,4})",
    6,
    "GROWTH/DEPTH with depth 6n + 4",
  ),
  "plain_densenet": (
    r"[1-9]\d{0,2}/(?P<depth>\d{1,4})",
    3,
    "GROWTH/DEPTH with depth 3n + 4",
  ),
  "wide_resnet": (
    r"(?P<depth>\d{2,4})-[1-9]\d{0,2}",
    6,
    "DEPTH-FACTOR with depth 6n + 4",
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of a training run."""

  # How members are trained: ekd (online ensemble distillation), dml (deep
  # mutual learning), ffl (feature fusion learning), pcl (peer collaborative
  # learning), ffsd (feature fusion and self-distillation), solo (each alone).
  method: Literal["ekd", "solo", "dml", "ffl", "pcl", "ffsd"] = "ekd"

  # Fraction of the full network's parameters that each student lacks, for
  # example 0.5,0.75,0.97 (which is also used if nothing says who is trained,
  # but by ffl, pcl and ffsd, see peers); each in (0, 1). The full network is
  # always trained too.
  ratios: Numbers = None

  # Channel multipliers instead of ratios, the full network (1) first, for
  # example 1,.8,.6,.4,.2.
  widths: Numbers = None

  # Full networks side by side, instead of ratios or widths. If nothing says who
  # is trained, 2 for ffl, 3 for pcl and 1, the leader, for ffsd.
  peers: OptionalInteger = None

  # Other networks that learn beside the full one (ffl, pcl, dml, solo), instead
  # of ratios: NETWORK:VARIANT,..., for example resnet:20,wide_resnet:16-2.
  partners: Word = None

  # Which family of networks. For small images: resnet (see depth), densenet,
  # plain_densenet, wide_resnet, bottleneck_resnet, vgg16, googlenet. For large
  # ones: imagenet_resnet (ResNet, ResNeXt, Wide ResNet), efficientnet. Or
  # MODULE:FUNCTION, your own (docs/your_own_network.md).
  network: Name = "resnet"

  # Layers of the resnet: 20, 32, 44, 56, 110, 1202 or any other 6n + 2.
  depth: Integer = 110

  # How the resnet's numbers are drawn: xavier (ekd), or he, with torch's own
  # for the last layer (ffl, pcl, ffsd).
  initialization: Literal["xavier", "he"] = "xavier"

  # Which of the other networks: 12/100, 24/250, 40/190 (densenet: growth and
  # depth, any other depth 6n + 4) or 12/40-unnormalized (PCL's); 12/40
  # (plain_densenet); 16-2, 40-2, 28-10 (wide_resnet: depth and factor); 110 or
  # wide20-8 (bottleneck_resnet); 18, 34, 50, 101, 152, resnext50, resnext101,
  # wide50 or wide101 (imagenet_resnet); b0 to b7 (efficientnet).
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

  # Pixels around an image before a random part of it is taken; if not set, 4
  # of 32. For sets of small images.
  crop_padding: OptionalInteger = None

  # What these pixels are: zeros, or the image mirrored (reflect).
  crop_fill: Literal["zeros", "reflect"] = "zeros"

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

  # Temperature of the distillation terms; if not set, 2 for ekd and ffsd, 3 for
  # ffl and pcl, 1 for dml.
  temperature: OptionalNumber = None

  # Weight of the cross-entropy terms (ekd).
  label_weight: Number = 0.7

  # Weight of the block feature terms (ekd).
  feature_weight: Number = 0.15

  # Weight of the terms towards the ensemble's logits (ekd).
  distill_weight: Number = 0.15

  # Which members train the shared stem (ekd): all of them, or the first only.
  base_gradients: Literal["all", "first"] = "all"

  # Epochs over which distillation terms grow (ffl, pcl, ffsd), 0 for none. If
  # not set, 80 (ffl, pcl) or 5 (ffsd) of 300, in proportion.
  ramp_up_epochs: OptionalInteger = None

  # How they grow: exponential, or as_coded: as in the one PCL code that is
  # public, where they are next to nothing until the end of the ramp.
  ramp_up: Literal["exponential", "as_coded"] = "exponential"

  # Most that a mean teacher keeps of itself in a step (pcl), in [0, 1).
  mean_teacher_decay: Number = 0.999

  # Times that an image is augmented for a step (pcl); if not set, once for each
  # network.
  views: OptionalInteger = None

  # Networks whose fused maps teach the leader (ffsd), 2 if not set.
  common_students: OptionalInteger = None

  # Weight decay of fusion modules (ffl, ffsd).
  fusion_weight_decay: Number = 1e-5

  # Learning rate of Adam, which trains the decoders (ffsd).
  decoder_learning_rate: Number = 1e-3

  # Weight of the terms that set common students apart (ffsd).
  diversity_weight: Number = 1e-5

  # Those terms as in the published code, or with normalised targets (ffsd).
  diversity: Literal["published", "normalized"] = "published"

  # Weight of the leader's terms on maps (ffsd).
  fusion_weight: Number = 10.0

  # Weight of the decoders' terms (ffsd).
  decoder_weight: Number = 1000.0

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
  if _members_open(config):
    if config.method in _PEERS:
      config = dataclasses.replace(config, peers=_PEERS[config.method])
    else:
      config = dataclasses.replace(config, ratios=DEFAULT_RATIOS)
  if config.epochs is None:
    epochs = DEFAULT_EPOCHS[config.dataset]
    config = dataclasses.replace(config, epochs=epochs)
  config = _with_method_defaults(config)
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


def _members_open(config: Config) -> bool:
  """Whether nothing says who is trained."""
  return all(getattr(config, name) is None for name in MEMBERS)


def member_count(config: Config) -> int:
  """How many networks a config has as members, the full one included."""
  if config.ratios is not None:
    return 1 + len(config.ratios)
  if config.partners is not None:
    return 1 + len(config.partners.split(","))
  return len(config.widths) if config.widths is not None else config.peers


def network_count(config: Config) -> int:
  """How many networks a resolved config trains in a step."""
  return member_count(config) + (config.common_students or 0)


def _with_method_defaults(config: Config) -> Config:
  """With what the method has and nobody has set.

  Raises:
    UserError: a ramp that does not fit into the training, or fewer networks
      than the method needs.
  """
  method = config.method
  changes: dict[str, Any] = {}
  if config.temperature is None:
    changes["temperature"] = TEMPERATURES.get(method)
  if method in _RAMP_UP and config.ramp_up_epochs is None:
    changes["ramp_up_epochs"] = max(1, round(_RAMP_UP[method] * config.epochs))
  if method == "ffsd" and config.common_students is None:
    changes["common_students"] = _COMMON_STUDENTS
  if method == "pcl" and config.views is None:
    changes["views"] = member_count(config)
  config = dataclasses.replace(config, **changes)
  ramp = config.ramp_up_epochs
  if ramp is not None and ramp > config.epochs:
    raise UserError(
      f"--ramp-up-epochs is {ramp} and --epochs is {config.epochs}: give at "
      f"most {config.epochs}, or leave it out"
    )
  if method in ("ffl", "pcl") and member_count(config) < 2:
    raise UserError(
      f"--method {method} needs two networks or more: give --peers 2, or "
      "ratios, widths or partners"
    )
  if method == "pcl" and config.views > member_count(config):
    raise UserError(
      f"--views is {config.views} and there are {member_count(config)} "
      "networks to see them: give at most one view for each"
    )
  return config


def alone(config: Config) -> Config:
  """The config that trains the same members with the same budget, alone."""
  nothing = dict.fromkeys(
    name for name, those in METHODS_OF.items() if "solo" not in those
  )
  return dataclasses.replace(
    config,
    method="solo",
    with_solo=False,
    ramp_up="exponential",
    **nothing,
  )


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
  if config.dataset != "folder":
    return config
  if config.num_classes not in (None, classes):
    raise UserError(
      f"--data-dir {config.data_dir} has {classes} classes and --num-classes "
      f"is {config.num_classes}: leave that out, or give the folder it was for"
    )
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
    "peers",
    "views",
  ):
    require(name, lambda n: n >= 1, "a whole number of at least 1")
  for name in (
    "validation_examples",
    "seed",
    "seeds",
    "process_id",
    "workers",
    "crop_padding",
    "ramp_up_epochs",
  ):
    require(name, lambda n: n >= 0, "a whole number of at least 0")
  for name in ("seed", "seeds"):
    require(name, lambda n: n < 2**32, "below 2^32")
  require("common_students", lambda n: n >= 2, "a whole number of at least 2")
  require("num_classes", lambda n: n >= 2, "a whole number of at least 2")
  for name in (
    "learning_rate",
    "learning_rate_drop_every",
    "temperature",
    "checkpoint_minutes",
    "decoder_learning_rate",
  ):
    require(name, lambda n: n > 0, "a number above 0")
  for name in (
    "weight_decay",
    "label_weight",
    "feature_weight",
    "distill_weight",
    "adapter_learning_rate",
    "fusion_weight_decay",
    "diversity_weight",
    "fusion_weight",
    "decoder_weight",
  ):
    require(name, lambda n: n >= 0, "a number of at least 0")
  for name in ("momentum", "mean_teacher_decay"):
    require(name, lambda n: 0 <= n < 1, "a number in [0, 1)")
  require(
    "learning_rate_drop_factor", lambda n: 0 < n <= 1, "a number in (0, 1]"
  )
  require(
    "learning_rate_drops",
    lambda n: 0 < n < 1,
    "fractions of the training, each in (0, 1)",
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
  said = [flag(name) for name in MEMBERS if getattr(config, name) is not None]
  if len(said) > 1:
    raise UserError(
      f"{said[0]} and {said[1]} were both given: they say the same thing in "
      "two ways, leave one out"
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
  for each in (config, *partners_of(config)):
    _check_depth(each)
    _check_network(each)
  _check_method(config)
  _check_data(config)
  _check_processes(config)


def partners_of(config: Config) -> list[Config]:
  """The config of each partner alone.

  Raises:
    UserError: one is a resnet without a depth.
  """
  found = []
  for partner in config.partners.split(",") if config.partners else ():
    network, _, variant = partner.partition(":")
    plain = {"partners": None, "network": network, "variant": variant or None}
    if network == "resnet" and variant.isdecimal():
      plain |= {"variant": None, "depth": int(variant)}
    elif network == "resnet":
      raise UserError(
        f"--partners has {partner!r}: give resnet:DEPTH, such as resnet:20"
      )
    found.append(dataclasses.replace(config, **plain))
  return found


def _check_depth(config: Config) -> None:
  if not 8 <= config.depth <= 10_000 or config.depth % 6 != 2:
    raise UserError(
      f"--depth is {config.depth}: must be 6n + 2 and at most 10000: 8, 14, "
      "20, 32, 44, 56, 110, 1202, ..."
    )


def _check_network(config: Config) -> None:
  network, variant = config.network, config.variant
  own = re.fullmatch(r"\w+(\.\w+)*:\w+", network)
  if network in _SINGLE or own:
    if variant is not None:
      raise UserError(
        f"--variant {variant} was given with --network {network}, which has "
        "none: leave it out"
        + (", --depth says which" if network == "resnet" else "")
      )
    return
  if network not in VARIANTS:
    near = nearest(network, [*_SINGLE, *VARIANTS])
    meant = f" (did you mean {near}?)" if near else ""
    raise UserError(
      f"--network {network} is not known{meant}: use one of "
      f"{', '.join([*_SINGLE, *VARIANTS])}, or MODULE:FUNCTION"
    )
  form, step, words = _OTHER_VARIANTS.get(network, (None, 0, ""))
  if variant in VARIANTS[network]:
    return
  if form and (found := re.fullmatch(form, variant or "")):
    depth = int(found["depth"])
    if depth >= 4 + step and (depth - 4) % step == 0:
      return
  given = "is missing" if variant is None else f"is {variant}"
  raise UserError(
    f"--variant {given}: {network} is one of {', '.join(VARIANTS[network])}"
    + (f", or any {words}" if words else "")
  )


def _check_method(config: Config) -> None:
  """Refuses options that the method does not have."""
  for name, those in METHODS_OF.items():
    value = getattr(config, name)
    if value is not None and config.method not in those:
      raise UserError(
        f"{flag(name)} {value} was given with --method {config.method}: it is "
        f"for {', '.join(those)}, leave it out"
      )
  if config.ramp_up != "exponential" and config.method != "pcl":
    raise UserError(
      f"--ramp-up {config.ramp_up} was given with --method {config.method}: it "
      "is for pcl, leave it out"
    )
  if config.optimizer == "rmsprop" and config.method in ("ffl", "ffsd"):
    raise UserError(
      f"--optimizer rmsprop was given with --method {config.method}, which is "
      "trained with nesterov: leave it out"
    )


def _check_data(config: Config) -> None:
  """Refuses options that are for another kind of data set."""
  streamed = data.info(config.dataset).streamed
  if streamed and config.crop_padding is not None:
    raise UserError(
      f"--crop-padding was given with --dataset {config.dataset}: it is for "
      "sets of small images, --crop says how large ones are varied"
    )
  if streamed and config.crop_fill != "zeros":
    raise UserError(
      f"--crop-fill {config.crop_fill} was given with --dataset "
      f"{config.dataset}: it is for sets of small images, --crop says how "
      "large ones are varied"
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
