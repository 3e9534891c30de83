"""The command line: flags to a config, a config to a finished run.

`main` is what every file under experiments/ calls with its own defaults;
`tools` is `python -m ekd_jax`. Both turn a `UserError` into one line on
standard error and its exit code (`errors`).

What loads JAX is imported inside the functions that need it: --help and a
mistyped flag are answered at once.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

# tyro documents this hook but keeps it in a private module. The tests of bad
# input would show a change; setup.cfg bounds tyro for it.
from tyro import _errors as tyro_errors

from ekd_jax import config as configs
from ekd_jax import data, process
from ekd_jax.config import Config
from ekd_jax.ending import exit_on_user_error
from ekd_jax.errors import UserError

# What --quick changes, besides training the students alone too; flags that
# are given win over it. Networks for large images get a smaller image.
_QUICK_NETWORKS = {
  "densenet": {"variant": "12/22", "ratios": (0.5, 0.8, 0.95)},
  "imagenet_resnet": {"variant": "18", "image_size": 32},
  "efficientnet": {
    "variant": "b0",
    "image_size": 32,
    "crop_padding": None,
    "learning_rate": 0.002,  # Of RMSProp; with 0.05 nothing is learnt.
  },
}
QUICK = {
  "dataset": "digits",
  "depth": 8,
  "ratios": None,  # The method's own.
  "epochs": 30,
  "batch_size": 64,
  "learning_rate": 0.05,
}


def main(
  defaults: Config,
  description: str,
  argv: Sequence[str] | None = None,
) -> None:
  """Parses the command line and runs what it asks for; may exit.

  Args:
    defaults: the config of the experiment without any flag.
    description: first lines of --help.
    argv: the arguments, those of the process by default.
  """
  argv = list(sys.argv if argv is None else argv)
  exit_on_user_error(lambda: _main(defaults, description, argv))


def tools(argv: Sequence[str] | None = None) -> None:
  """`python -m ekd_jax`: works on the run directories of earlier runs."""
  argv = list(sys.argv if argv is None else argv)
  commands = {"report": report, "evaluate": evaluate, "compare": compare}

  def run() -> None:
    if len(argv) == 1:
      raise UserError(
        f"no command was given: use one of {', '.join(commands)}, or --help"
      )
    if (
      len(argv) > 1
      and not argv[1].startswith("-")
      and (argv[1] not in commands)
    ):
      near = configs.nearest(argv[1], list(commands))
      meant = f" (did you mean {near}?)" if near else ""
      raise UserError(
        f"{argv[1]} is no command{meant}: use one of {', '.join(commands)}"
      )
    with mistakes_in_one_line():
      tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="python -m ekd_jax",
        description="Works on the run directories of earlier runs.",
        args=argv[1:],
      )

  exit_on_user_error(run)


def parse(
  defaults: Config, description: str, arguments: Sequence[str]
) -> Config:
  """The config that the arguments ask for, not yet resolved.

  Raises:
    UserError: an unknown flag, a value of the wrong type, or a flag that is
      for another network.
  """
  if "--quick" in arguments:
    quick = QUICK | _QUICK_NETWORKS.get(defaults.network, {})
    defaults = dataclasses.replace(defaults, **quick)
  if any(_given(configs.flag(name), arguments) for name in configs.MEMBERS):
    nobody = dict.fromkeys(configs.MEMBERS)
    defaults = dataclasses.replace(defaults, **nobody)
  with mistakes_in_one_line(type(defaults)):
    config = tyro.cli(
      type(defaults),
      default=defaults,
      description=description,
      args=list(arguments),
      config=(tyro.conf.FlagCreatePairsOff,),
    )
  if _given("--depth", arguments) and config.network != "resnet":
    own = config.network not in configs.VARIANTS
    raise UserError(
      f"--depth {config.depth} was given with --network {config.network}, "
      "which has none: leave it out" + ("" if own else ", --variant says which")
    )
  # An experiment's own padding is for its small images, of its size.
  other = data.info(config.dataset).streamed or _given(
    "--image-size", arguments
  )
  if other and not _given("--crop-padding", arguments):
    config = dataclasses.replace(config, crop_padding=None)
  if data.info(config.dataset).streamed and not _given(
    "--crop-fill", arguments
  ):
    config = dataclasses.replace(config, crop_fill="zeros")
  drops, every = "--learning-rate-drops", "--learning-rate-drop-every"
  if _given(drops, arguments):
    if _given(every, arguments):
      raise UserError(
        f"{drops} and {every} were both given: they say the same thing in two "
        "ways, leave one out"
      )
    config = dataclasses.replace(config, learning_rate_drop_every=None)
  if config.quick and config.method != "solo":
    return dataclasses.replace(config, with_solo=True)
  return config


def report(run_dir: Annotated[str, tyro.conf.Positional]) -> None:
  """Writes RUN_DIR/report.html again and prints the table of members.

  Args:
    run_dir: a run directory, finished or not.
  """
  from ekd_jax import report as reports
  from ekd_jax import run_directory

  run_directory.read_config(run_dir)
  console = new_console()
  console.print(reports.members_table(run_directory.summarize(run_dir)))
  console.print(
    f"report: {reports.write(run_dir)}", highlight=False, soft_wrap=True
  )


def evaluate(
  run_dir: Annotated[str, tyro.conf.Positional],
  data_dir: str | None = None,
) -> None:
  """Scores a run's newest checkpoint on the whole test set again.

  Args:
    run_dir: a run directory with a checkpoint.
    data_dir: where the data is, if it has moved since.
  """
  from ekd_jax import loading

  use_compilation_cache(new_console())
  run = loading.load_run(run_dir)
  scores = loading.evaluate(run, data_dir=data_dir)
  table = Table(title=f"test set, {scores['examples']:.0f} images")
  table.add_column("member")
  for heading in ("top-1 %", "top-5 %", "loss", "agreement %"):
    table.add_column(heading, justify="right")
  scored = [n.removeprefix("top1/") for n in scores if n.startswith("top1/")]
  known = [*run.students, "ensemble"]
  for name in [*known, *(name for name in scored if name not in known)]:
    row = [
      scores.get(f"{what}/{name}")
      for what in ("top1", "top5", "loss", "agreement")
    ]
    table.add_row(name, *("-" if v is None else f"{v:.2f}" for v in row))
  new_console().print(table)


def compare(
  run_a: Annotated[str, tyro.conf.Positional],
  run_b: Annotated[str, tyro.conf.Positional],
) -> None:
  """Puts two runs side by side, member by member.

  Args:
    run_a: a run directory.
    run_b: another one.
  """
  from ekd_jax import report as reports

  console = new_console()
  console.print(reports.compare_table([run_a, run_b]))
  for line in reports.unlike([run_a, run_b]):
    console.print(f"warning: {line}", highlight=False, soft_wrap=True)


def _main(defaults: Config, description: str, argv: Sequence[str]) -> None:
  config = configs.resolve(parse(defaults, description, argv[1:]))
  console = new_console()
  if config.plan:
    print_plan(config, console)
    return
  with started(config, console) as stop:
    run(config, argv, console, stop)


@contextlib.contextmanager
def started(config: Config, console: Console) -> Iterator[Any]:
  """This process as one that trains: what is done once, before any training.

  Yields:
    The `stopping.StopRequest` of all trainings in it.
  """
  if config.tune_allocator:
    process.tune_allocator()
  from ekd_jax.training import hosts, stopping

  hosts.join(config, console)
  if not hosts.is_first():
    console.quiet = True
  with stopping.StopRequest() as stop, hosts.losses_of_others():
    process.tidy_after_compiling()
    yield stop


def check(config: Config) -> None:
  """Refuses what cannot be trained, before any file is written or fetched.

  Raises:
    UserError: the networks, the batch, the devices or the run directory do not
      fit.
  """
  import jax

  from ekd_jax import build
  from ekd_jax.training import hosts, loop

  build.members(config)
  build.check_maps(config)
  training_examples(config, jax.device_count())
  loop.check_devices(config)
  hosts.from_first(lambda: _check_directories(config))


def _check_directories(config: Config) -> None:
  from ekd_jax import run_directory

  for each in (config, *_runs(config)):
    run_directory.check(each.run_dir, each)


def run(
  config: Config,
  argv: Sequence[str],
  console: Console,
  stop: Any,
  *,
  announce: Callable[[Config], str] | None = None,
) -> None:
  """Trains everything the config asks for, then reports.

  Args:
    config: resolved.
    argv: the command line, for the record.
    console: where progress is shown.
    stop: see `started`.
    announce: told when a training begins; returns what its lines start with.

  Raises:
    UserError: see `check`.
  """
  import jax

  from ekd_jax import build, run_directory, storage
  from ekd_jax import report as reports
  from ekd_jax.training import hosts, loop

  run_dir = storage.path(config.run_dir)
  runs = _runs(config)
  check(config)
  if config.compilation_cache:
    use_compilation_cache(console)
  if config.download and config.data_dir and config.dataset != "digits":
    console.print(
      f"reading {config.dataset} from {config.data_dir}; fetched first if it "
      f"is not there (about {250 if config.dataset == 'svhn' else 170} MB)",
      soft_wrap=True,
    )
  dataset = build.load_data(config)
  with contextlib.ExitStack() as stack:
    if hosts.is_first():
      stack.enter_context(storage.locked(config.run_dir))
      _check_directories(config)  # Somebody else may have been here since.
      if config.seeds is not None:
        run_directory.open_run(run_dir, config, argv)
    for each in runs:
      name = str(storage.path(each.run_dir).relative_to(run_dir))
      title = each.method if name == "." else name
      # The programs of the run before: they take memory, and memory maps.
      jax.clear_caches()
      loop.train(
        each,
        dataset,
        argv=argv,
        console=console,
        title=announce(each) if announce else title,
        stop=stop,
      )
    if not hosts.is_first():
      return
    for directory in dict.fromkeys([*(each.run_dir for each in runs), run_dir]):
      run_directory.write_summary(directory)
      reports.write(directory)
    summary = run_directory.summarize(run_dir)
  console.print(reports.members_table(summary))
  console.print(
    f"report: {run_dir / 'report.html'}", highlight=False, soft_wrap=True
  )


def use_compilation_cache(console: Console) -> None:
  problem = process.use_compilation_cache()
  if problem is not None:
    console.print(f"warning: {problem}", highlight=False, soft_wrap=True)


def _runs(config: Config) -> list[Config]:
  """The single trainings that a config stands for, each with its directory."""
  runs = [config]
  if config.seeds is not None:
    from ekd_jax.run_directory import seed_directory

    runs = [
      dataclasses.replace(
        config,
        seed=seed,
        seeds=None,
        run_dir=str(seed_directory(config.run_dir, seed)),
      )
      for seed in config.seeds
    ]
  if not config.with_solo:
    return runs
  from ekd_jax import storage
  from ekd_jax.run_directory import SOLO

  return [
    each
    for run in runs
    for each in (
      run,
      dataclasses.replace(
        configs.alone(run), run_dir=str(storage.path(run.run_dir) / SOLO)
      ),
    )
  ]


def training_examples(config: Config, devices: int = 1) -> int:
  """How many images are trained on; needs no data.

  Args:
    config: what is to be trained.
    devices: how many a batch must divide by.

  Raises:
    UserError: more than there are, or fewer than one batch takes.
  """
  info = data.info(config.dataset)
  total = info.train_examples
  if info.streamed and config.data_dir is not None:
    total = len(data.large.find(config.dataset, config.data_dir)[0])
  examples = data.count_training_examples(
    info.name,
    total,
    train_examples=config.train_examples,
    validation_examples=config.validation_examples,
  )
  if config.batch_size > examples:
    raise UserError(
      f"--batch-size is {config.batch_size} but there are only {examples} "
      f"training images: use at most {examples // devices * devices}"
    )
  return examples


def print_plan(config: Config, console: Console) -> None:
  from ekd_jax import build, report

  members = build.members(config)
  build.check_maps(config)
  examples = training_examples(config)
  steps = examples // config.batch_size
  summary = {
    "method": config.method,
    "dataset": config.dataset,
    "network": build.network_name(config),
    "epochs": config.epochs,
    "seed": config.seed if config.seeds is None else list(config.seeds),
    "members": [member._asdict() for member in members],
    "ensemble": {},
  }
  console.print(report.members_table(summary))
  console.print(
    f"{config.method} on {config.dataset}: {examples} training images, "
    f"{config.epochs} epochs of {steps} steps = {config.epochs * steps} steps "
    f"of {config.batch_size} images"
    + (f", {len(config.seeds)} seeds" if config.seeds else "")
    + (
      f", beside {config.common_students} common students"
      if config.common_students
      else ""
    )
    + (", then the same for each student alone" if config.with_solo else ""),
    highlight=False,
    soft_wrap=True,
  )
  if config.compile:
    _print_memory(config, examples, console)


def _print_memory(config: Config, examples: int, console: Console) -> None:
  process.tune_allocator()
  from ekd_jax.training import loop, planning

  loop.check_devices(config)
  console.print("compiling", soft_wrap=True)
  table = Table()
  table.add_column("trained")
  table.add_column("memory of a step, MiB per device", justify="right")
  for name, count in planning.step_bytes(config, examples).items():
    table.add_row(name, f"{count / 2**20:.1f}")
  console.print(table)


def new_console() -> Console:
  # A pipe has no width; folding columns at 80 would break numbers.
  return Console() if sys.stdout.isatty() else Console(width=200)


def mistakes_in_one_line(
  options_type: type | None = None,
) -> contextlib.AbstractContextManager[None]:
  """Makes one line of what tyro would say in a box.

  Args:
    options_type: the dataclass of the options that there are, from which the
      one that was meant is named; by default none is.

  Returns:
    A context; tyro's mistakes in it are raised as `UserError`.
  """
  options = dataclasses.fields(options_type) if options_type else ()
  # What is on by default is turned off by --no-.
  flags = [
    configs.flag(f"no_{f.name}" if f.default is True else f.name)
    for f in options
  ]

  def hook(event: tyro_errors.ParseErrorEvent) -> None:
    if isinstance(event, tyro_errors.UnrecognizedArgs):
      word = event.tokens[0].partition("=")[0]
      near = configs.nearest(word.replace("_", "-"), flags)
      meant = f": did you mean {near}?" if near else "; see --help"
      raise UserError(f"{event.tokens[0]} is not a known option{meant}")
    if isinstance(event, tyro_errors.InvalidChoice):
      raise UserError(
        f"{_flag_of(event.argument)} {event.value} is not possible: choose "
        f"one of {', '.join(event.choices)}"
      )
    if isinstance(event, tyro_errors.BadValue):
      raise UserError(
        f"{_flag_of(event.argument)} needs a value and got none; see --help"
      )
    if isinstance(event, tyro_errors.InstantiationFailure):
      where = _flag_of(event.argument) if event.argument else "the arguments"
      message = " ".join(event.message.split())
      raise UserError(f"{where}: {message}; see --help")
    if isinstance(event, tyro_errors.MissingArgs):
      names = ", ".join(_flag_of(a.arg) for a in event.missing_arguments)
      raise UserError(f"{names} is missing; see --help")

  return tyro_errors.on_parse_error(hook)


def _flag_of(argument: Any) -> str:
  name = argument.lowered.name_or_flags[-1]
  if argument.is_positional():
    return name.rpartition(".")[-1].replace("-", "_").upper()
  return name


def _given(flag: str, arguments: Sequence[str]) -> bool:
  return any(a == flag or a.startswith(flag + "=") for a in arguments)
