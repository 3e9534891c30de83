"""What the train step of a real method is compiled to: one program, no detour.

Of ResNet-8, if nothing else is said, and a thin student on 32x32 images, fully
optimised, as a run on one CPU device has it.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import build, data
from ekd_jax import config as configs
from ekd_jax.models import layers
from ekd_jax.training import optimizers, parallel, step
from tests.models import formulations
from tests.reference import resnet as reference

# A number that is no side, no channel count and no kernel size: a shape that
# holds it is that of maps or of what is made of them.
BATCH = 20
DEPTH = 8
CHANNELS = ((16, 32, 64), (7, 15, 31))
STAGES_OF_MEMBERS = sum(map(len, CHANNELS))
EXAMPLES = 3 * BATCH


class Program(NamedTuple):
  """A mapped train step and what it is called with, on one device."""

  train_step: Any
  state: Any
  examples: Any
  order: Any


def program(formulation, devices, depth=DEPTH, scan="auto", remat=False):
  """The train step as the loop builds it."""
  config = configs.resolve(
    configs.Config(
      dataset="cifar10",
      depth=depth,
      ratios=(0.75,),
      batch_size=BATCH,
      conv=formulation,
      scan=scan,
      remat=remat,
      run_dir="run",
    )
  )
  info = data.info(config.dataset)
  method = build.method(config, total_steps=3)
  random = np.random.default_rng(0)
  examples = {
    "image": random.integers(0, 256, (EXAMPLES, 32, 32, 3), np.uint8),
    "label": random.integers(0, 10, EXAMPLES).astype(np.int32),
  }
  return Program(
    parallel.per_device(
      step.make_train_step(method, info, batch_size=BATCH, steps_per_epoch=3),
      devices,
      donate_argnums=(0,),
    ),
    parallel.replicate(step.init_state(method, info, seed=0), devices),
    parallel.replicate(examples, devices),
    parallel.replicate(np.arange(EXAMPLES, dtype=np.int32), devices),
  )


@functools.cache
def compiled(formulation, **network):
  """XLA's program for one device."""
  own = program(formulation, jax.devices()[:1], **network)
  lowered = own.train_step.lower(own.state, own.examples, own.order)
  # Not what conftest.py has set for the other tests.
  return lowered.compile({"xla_cpu_use_fusion_emitters": True})


def operations(text):
  """(operation, dimensions) of every line of an HLO program.

  Those inside fusions are lines too. Tuples have no dimensions.
  """
  line = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\w+\[([\d,]*)\]\S*|\(.*?\)) ([\w-]+)\(",
    re.MULTILINE,
  )
  return [
    (operation, tuple(int(d) for d in (dimensions or "").split(",") if d))
    for dimensions, operation in line.findall(text)
  ]


def host_transfers(text):
  """What in a program talks to the host, or to another program."""
  transfers = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
  targets = re.findall(r'custom_call_target="([^"]+)"', text)
  return [
    *(name for name, _ in operations(text) if name in transfers),
    *(target for target in targets if "callback" in target),
  ]


def moved_maps(text):
  """Transposes of maps: 4-d arrays with the batch as one of their sides.

  Every `transpose` is counted. Moving data without one takes a `copy` from
  one layout to another, which XLA writes as a `transpose` that changes the
  layout only, and a `copy` after it: this is one movement, and counted once.
  """
  return [
    dimensions
    for operation, dimensions in operations(text)
    if operation == "transpose" and len(dimensions) == 4 and BATCH in dimensions
  ]


@pytest.mark.parametrize("formulation", formulations.NAMES)
def test_training_compiles_one_program_and_keeps_no_old_state(
  formulation, compilations
):
  train_step, state, examples, order = program(formulation, jax.devices()[:1])
  before = len(compilations)
  for _ in range(3):
    previous = state
    state, metrics = train_step(state, examples, order)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous))
  assert len(compilations) - before == 1
  assert parallel.unreplicate(state["step"]) == 3
  assert np.isfinite(parallel.unreplicate(metrics)["loss"])


def test_the_members_are_those_that_are_counted_here():
  config = configs.resolve(
    configs.Config(
      dataset="cifar10", depth=DEPTH, ratios=(0.75,), run_dir="run"
    )
  )
  family = build.family(config)
  members = build.members(config)
  assert tuple(family.stage_channels(m.width) for m in members) == CHANNELS


def test_no_stack_of_shifted_maps_repeats_the_relu_before_it():
  # Of maps: drawing the crops takes a maximum too, of numbers per image.
  fusions = [
    {name for name, dimensions in operations(part) if len(dimensions) == 4}
    for part in compiled("split").as_text().split("\n\n")
  ]
  stacks = [held for held in fusions if "concatenate" in held]
  assert len(stacks) > 20
  assert not any("maximum" in held for held in stacks)


# ResNet-8 has a block per stage, ResNet-14 an equal one after it: the loop. A
# block has two norms and one for its shortcut; that of the stem stands in for
# the shortcut of the full network's first block, which has none.
@pytest.mark.parametrize(
  ("network", "norms", "looped_norms"),
  [({}, 3, 0), ({"depth": 14, "scan": "on"}, 3, 2)],
)
def test_maps_of_every_norm_are_written_where_they_are_computed(
  network, norms, looped_norms
):
  """By `once.compute_once`, which the compiler must not see through."""
  text = compiled("split", **network).as_text()
  kept = re.findall(
    rf"= \(f32\[\d+,\d+,\d+,{BATCH}\]\S+, pred\[\]\S*\) while\(", text
  )
  # What the norm centres and what it returns. A loop's body does so twice, in
  # the forward pass and again in the backward one, and keeps the gradient.
  per_stage = 2 * norms + (2 + 2 + 1) * looped_norms
  assert len(kept) == STAGES_OF_MEMBERS * per_stage
  # For that, no maps are copied; a loop over blocks copies what it carries.
  copies = [
    dimensions
    for operation, dimensions in operations(text)
    if operation == "copy" and len(dimensions) == 4 and BATCH in dimensions
  ]
  images = 1
  carried = 2 * STAGES_OF_MEMBERS if looped_norms else 0
  assert len(copies) == images + carried


def test_stacking_shifted_maps_again_takes_less_memory():
  """XLA would keep the first stacks, if it knew that the others are equal."""
  scratch = [
    compiled("split", remat=remat).memory_analysis().temp_size_in_bytes
    for remat in (True, False)
  ]
  # Deep networks come to a half; this one has little between its ends.
  assert scratch[0] < 0.7 * scratch[1]


@pytest.mark.parametrize("formulation", formulations.NAMES)
def test_equal_layers_are_traced_and_lowered_once(formulation):
  """Twice as many equal blocks are calls of the same functions."""

  def functions(depth):
    own = program(formulation, jax.devices()[:1], depth=depth, scan="off")
    lowered = own.train_step.lower(own.state, own.examples, own.order)
    names = re.findall(r"func\.func private @([a-z_]+)", lowered.as_text())
    return sorted(name.strip("_") for name in names)

  found = functions(14)
  assert found.count("batch_norm_relu") > 0
  assert (found.count("convolution") > 0) == (formulation == "split")
  assert functions(20) == found


def test_the_learning_rate_is_computed_once_for_all_parameters():
  """By its last operation, which XLA does not repeat for each of them."""
  optimizer = optimizers.nesterov_sgd(
    optimizers.step_schedule(
      0.1, drops=(0.5, 0.75), drop_factor=0.1, total_steps=100
    ),
    momentum=0.9,
    weight_decay=1e-4,
    adapter_multiplier=0.5,
  )
  params = {"stem": [jnp.ones(size) for size in (5, 6, 7)]}
  lowered = jax.jit(optimizer.update).lower(
    params, optimizer.init(params), params
  )
  found = operations(lowered.compile().as_text())
  comparisons_with_both_drops = found.count(("compare", (2,)))
  assert comparisons_with_both_drops == 1


@pytest.mark.parametrize("formulation", formulations.NAMES)
def test_every_leaf_of_the_state_takes_over_its_predecessors_memory(
  formulation,
):
  own = program(formulation, jax.devices()[:1])
  leaves = jax.tree.leaves(own.state)
  found = compiled(formulation)
  header = found.as_text().partition("\n")[0]
  aliases = re.findall(r"\{(\d+)\}: \((\d+), \{\}, \S+-alias\)", header)
  # State first, as argument and as result: each leaf becomes itself.
  assert aliases == [(str(i), str(i)) for i in range(len(leaves))]
  memory = found.memory_analysis()
  assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in leaves)
  # Nothing but the metrics is memory that was not there before.
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


@pytest.mark.parametrize("formulation", formulations.NAMES)
def test_nothing_in_a_step_waits_for_the_host(formulation):
  assert host_transfers(compiled(formulation).as_text()) == []


def test_a_callback_would_be_found():
  # That the test above can fail.
  def talks(x):
    jax.debug.callback(lambda value: None, x)
    return x + 1

  text = jax.jit(talks).lower(jnp.ones(3)).compile().as_text()
  assert host_transfers(text)


def test_split_maps_are_transposed_once_at_the_entrance():
  text = compiled("split").as_text()
  assert moved_maps(text) == [(3, 32, 32, BATCH)]
  # No copy changes a layout unseen: all maps lie as their dimensions say.
  shapes = re.findall(r"= \w+\[([\d,]+)\]\{([\d,]+)[:}]", text)
  layouts = {
    layout
    for dimensions, layout in shapes
    if dimensions.count(",") == 3 and str(BATCH) in dimensions.split(",")
    # The image, whose transpose is a change of layout at first.
    if not dimensions.startswith("3,")
  }
  assert layouts == {"3,2,1,0"}


def test_lax_maps_are_transposed_many_times_on_a_cpu():
  # That the test above counts what it should: XLA's own convolutions want
  # another layout there, which is what the split formulation avoids.
  assert len(moved_maps(compiled("lax").as_text())) > 20


# --- arithmetic -------------------------------------------------------------


def without_arithmetic(maps, kernel, stride=1, **kind):
  """In the place of a convolution: one number at every place of the result.

  A number of what it is given, gradients likewise, so that nothing which leads
  here is left out of the program as unused.
  """
  batch, height, width, _ = maps.shape
  shape = batch, -(-height // stride), -(-width // stride), kernel.shape[3]

  @jax.custom_vjp
  def spread(maps, kernel):
    return jnp.broadcast_to(maps[0, 0, 0, 0], shape)

  def pull(_, gradient):
    one = gradient[0, 0, 0, 0]
    return jnp.broadcast_to(one, maps.shape), jnp.broadcast_to(
      one, kernel.shape
    )

  spread.defvjp(lambda *operands: (spread(*operands), None), pull)
  return spread(maps, kernel)


def flops_of_step():
  """XLA's count for a whole step before it is optimised."""
  own = program("lax", jax.devices()[:1])
  lowered = own.train_step.lower(own.state, own.examples, own.order)
  return lowered.cost_analysis()["flops"]


def test_a_lax_step_computes_each_convolution_three_times_and_no_more(
  monkeypatch,
):
  """Forward, by its input, by its kernel; the images need no gradient.

  What XLA counts for a step, less what it counts for the same step without
  any convolution, against the convolutions of the networks on paper: one stem
  for all, the branches, the adapters of the thin one. As XLA, the paper leaves
  out the taps on the zero padding.
  """
  whole = flops_of_step()
  monkeypatch.setattr(layers, "_convolve", without_arithmetic)
  rest = flops_of_step()
  stem = reference.convolutions(DEPTH, CHANNELS[0])[0].valid_macs
  branches = sum(
    convolution.valid_macs
    for channels in CHANNELS
    for convolution in reference.convolutions(DEPTH, channels)[1:]
  )
  adapters = sum(
    side**2 * thin * full
    for side, thin, full in zip((32, 16, 8), *CHANNELS[::-1], strict=True)
  )
  expected = 2 * BATCH * (2 * stem + 3 * (branches + adapters))
  # The smallest convolution, once more, would show.
  smallest = 2 * BATCH * 32**2 * 7 * 15 // 4
  tolerance = 1e-4
  assert smallest > 5 * tolerance * expected
  np.testing.assert_allclose(whole - rest, expected, rtol=tolerance)
  # The rest, from augmentation to optimizer, is 2.8 % of it here; at ResNet-20
  # with five members, 2.3 %.
  assert rest < 0.035 * expected
