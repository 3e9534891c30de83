"""From a config to what it describes, where no run shows it."""

import numpy as np
import optax
import pytest

from ekd_jax import build
from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.errors import UserError
from tests.reference.optimizers import TorchAdam, TorchSGD


def ramp(method, epochs, **options):
  """Its weight in the last step of each epoch, three steps each."""
  config = configs.resolve(
    Config(method=method, dataset="digits", depth=8, epochs=epochs, **options)
  )
  weight = build.ramp_up(config, 3 * epochs)
  steps = np.arange(3 * epochs)
  values = np.array([float(weight(np.int32(step))) for step in steps])
  by_epoch = values.reshape(epochs, 3)
  assert (by_epoch == by_epoch[:, :1]).all()
  return by_epoch[:, 0]


@pytest.mark.parametrize("method", ["ffl", "pcl"])
def test_distillation_grows_over_80_of_300_epochs(method):
  found = ramp(method, 300)
  expected = {0: 0.006738, 1: 0.007629, 10: 0.021750, 40: 0.286505}
  for epoch, value in expected.items():
    assert found[epoch] == pytest.approx(value, abs=6e-7)
  assert found[79] == pytest.approx(0.999219, abs=6e-7)
  assert (found[80:] == 1).all()


def test_a_leader_s_weight_grows_over_five_epochs_counted_from_one():
  found = 10 * ramp("ffsd", 300)
  expected = [0.407622, 1.652989, 4.493290, 8.187308, 10, 10]
  assert found[:6] == pytest.approx(expected, abs=6e-6)


def test_the_ramp_of_the_public_pcl_code_is_one_epoch_of_weight():
  found = ramp("pcl", 300, ramp_up="as_coded")
  assert found[:3] == pytest.approx([0.006738, 1, 0.006738], abs=6e-7)
  assert found[3] == pytest.approx(2e-9, rel=0.05)
  assert (found[4:81] < 1e-15).all()
  assert (found[81:] == 1).all()


@pytest.mark.parametrize("method", ["ffl", "ffsd"])
def test_every_kind_of_parameter_has_its_decay_and_its_schedule(method):
  """Rates of all kinds drop at half and at three quarters of the steps."""
  config = configs.resolve(
    Config(
      method=method,
      dataset="digits",
      depth=8,
      epochs=4,
      learning_rate=0.2,
      momentum=0.8,
      weight_decay=0.03,
      fusion_weight_decay=0.1,
      decoder_learning_rate=0.004,
    )
  )
  own = {
    "networks": TorchSGD(0.8, 0.03),
    "spread": TorchSGD(0.8, 0.03),
    "fusion": TorchSGD(0.8, 0.1),
    "decoders": TorchAdam(0.03),
  }
  optimizer = build.optimizer(config, 8)
  rng = np.random.default_rng(0)
  params = {name: rng.normal(size=3).astype(np.float32) for name in own}
  expected = params
  state = optimizer.init(params)
  for factor in [1.0] * 4 + [0.1] * 2 + [0.01] * 2:
    gradients = {name: rng.normal(size=3).astype(np.float32) for name in own}
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    expected = {
      name: torch.step(
        expected[name],
        gradients[name],
        (0.004 if name == "decoders" else 0.2) * factor,
      )
      for name, torch in own.items()
    }
    for name, value in expected.items():
      np.testing.assert_allclose(
        params[name], value, rtol=1e-5, atol=1e-6, err_msg=name
      )


def test_no_ramp_is_full_weight_from_the_start():
  assert (ramp("ffl", 4, ramp_up_epochs=0) == 1).all()


@pytest.mark.parametrize(
  ("options", "said"),
  [
    # The one has 8 x 8 pixels in the end, the other 4 x 4.
    (
      {"method": "ffl", "partners": "efficientnet:b0", "image_size": 32},
      "8 x 8 in resnet8, 1 x 1 in efficientnet_b0",
    ),
    (
      {"method": "ffsd", "network": "densenet", "variant": "4/22"},
      "those of densenet_bc_4_22 are 4 x 4, 2 x 2, 2 x 2",
    ),
    (
      {"method": "ffsd", "network": "vgg16", "image_size": 32},
      "those of vgg16 are 4 x 4, 2 x 2, 1 x 1",
    ),
  ],
)
def test_maps_that_do_not_fit_are_refused(options, said):
  config = configs.resolve(Config(dataset="digits", depth=8, **options))
  with pytest.raises(UserError, match=said):
    build.check_maps(config)


@pytest.mark.parametrize(
  ("network", "variant"),
  [
    ("resnet", None),
    ("wide_resnet", "16-2"),
    ("plain_densenet", "12/40"),
    ("bottleneck_resnet", "110"),
    ("googlenet", None),
  ],
)
def test_ffsd_takes_the_networks_of_its_paper(network, variant):
  build.check_maps(
    configs.resolve(
      Config(
        method="ffsd", dataset="cifar100", network=network, variant=variant
      )
    )
  )


@pytest.mark.parametrize("conv", ["lax", "split"])
def test_maps_are_looked_at_in_any_formulation(conv):
  config = Config(method="ffsd", dataset="digits", depth=8, conv=conv)
  build.check_maps(configs.resolve(config))


OWN = {
  "no_module:family": "there is no module no_module",
  "no_module.net:family": "there is no module no_module",
  "number:family": "number has no family to call",
  "nothing:family": "returned NoneType, not a family of networks",
}


@pytest.mark.parametrize("where", OWN)
def test_what_is_no_network_is_told_in_one_line(where, tmp_path, monkeypatch):
  (tmp_path / "number.py").write_text("family = 3\n")
  (tmp_path / "nothing.py").write_text("def family(*what): pass\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match=OWN[where]):
    build.family(Config(dataset="digits", network=where))


def test_a_mistake_in_the_users_module_is_shown_as_it_is(tmp_path, monkeypatch):
  (tmp_path / "wrong.py").write_text("import math\nmath.no_such_thing\n")
  (tmp_path / "misses.py").write_text("import no_such_package\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(AttributeError, match="no_such_thing"):
    build.family(Config(dataset="digits", network="wrong:family"))
  with pytest.raises(ModuleNotFoundError, match="no_such_package"):
    build.family(Config(dataset="digits", network="misses:family"))
