"""Ratios become widths: the nearest network, or a refusal that helps."""

import re

import pytest

from ekd_jax.compression import Cost, Member, members_of_widths, solve_widths
from ekd_jax.errors import UserError
from ekd_jax.models import CifarResNet
from tests.reference import resnet as reference

NETWORK = CifarResNet(110, 100)


def solve(ratios, network=NETWORK):
  return solve_widths(ratios, network.cost, network.width_candidates())


def linear_cost(width):
  """A network of 1,000 parameters whose size is proportional to its width."""
  return Cost(params=round(1000 * width), macs=round(7000 * width))


@pytest.mark.parametrize("depth", [20, 110])
@pytest.mark.parametrize(
  "asked", [0.05, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.97, 0.985]
)
def test_the_nearest_network_of_all_is_chosen(depth, asked):
  network = CifarResNet(depth, 100)
  full = reference.parameters(depth, (16, 32, 64), 100)
  # Every network there is: stage channels change at multiples of 1/64.
  sizes = {
    reference.parameters(depth, (k // 4, k // 2, k), 100) for k in range(4, 65)
  }
  nearest = min(sizes, key=lambda size: abs((1 - size / full) - asked))
  member = solve([asked], network)[1]
  assert member.params == nearest
  assert member.ratio == pytest.approx(1 - nearest / full, abs=1e-12)
  assert abs(member.ratio - asked) <= 0.02


def test_the_full_network_is_first_and_the_order_is_kept():
  members = solve([0.97, 0.5, 0.75])
  assert [m.name for m in members] == [f"student_{i}" for i in range(4)]
  assert [m.ratio_asked for m in members] == [0.0, 0.97, 0.5, 0.75]
  assert members[0].width == 1.0
  assert members[0].ratio == 0.0
  assert members[1].width < members[3].width < members[2].width < 1


def test_a_member_tells_what_it_costs():
  candidates = (0.25, 0.5, 1.0)
  assert solve_widths([0.74, 0.5], linear_cost, candidates) == (
    Member("student_0", 0.0, 0.0, 1.0, 1000, 7000),
    Member("student_1", 0.74, 0.75, 0.25, 250, 1750),
    Member("student_2", 0.5, 0.5, 0.5, 500, 3500),
  )


def test_costs_are_those_of_the_member_s_network():
  for member in solve([0.5, 0.75, 0.97]):
    assert NETWORK.cost(member.width) == (member.params, member.macs)


@pytest.mark.parametrize("asked", [0.479, 0.521, 0.7, 0.99])
def test_a_ratio_out_of_reach_is_refused_with_the_nearest_one(asked):
  candidates = (0.5, 1.0)
  with pytest.raises(UserError) as refusal:
    solve_widths([asked], linear_cost, candidates)
  message = str(refusal.value)
  assert "\n" not in message
  assert f"{asked:g}" in message
  assert "0.5000 of the parameters (width 0.5)" in message
  # The advice works.
  advice = float(re.search(r"ratio near ([0-9.]+) ", message)[1])
  assert solve_widths([advice], linear_cost, candidates)[1].width == 0.5


@pytest.mark.parametrize("asked", [0.481, 0.5, 0.519])
def test_a_ratio_within_two_percent_is_accepted(asked):
  member = solve_widths([asked], linear_cost, (0.5, 1.0))[1]
  assert (member.ratio_asked, member.ratio) == (asked, 0.5)


def test_the_tolerance_can_be_widened():
  with pytest.raises(UserError):
    solve_widths([0.6], linear_cost, (0.5, 1.0))
  member = solve_widths([0.6], linear_cost, (0.5, 1.0), tolerance=0.2)[1]
  assert member.width == 0.5


@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.5, 0.75, 0.501)])
def test_two_ratios_that_end_in_one_network_are_refused(ratios):
  with pytest.raises(UserError, match="same network as student_1") as refusal:
    solve(ratios)
  assert f"ratio {ratios[-1]:g} " in str(refusal.value)


@pytest.mark.parametrize("asked", [0.001, 0.01])
def test_a_ratio_near_zero_would_be_the_full_network_again(asked):
  next_thinner = reference.parameters(110, (15, 31, 63), 100)
  smallest = 1 - next_thinner / reference.parameters(110, (16, 32, 64), 100)
  with pytest.raises(UserError, match=f"anything is {smallest:.4f}"):
    solve([asked])


@pytest.mark.parametrize("asked", [0.998, 0.9999])
def test_the_thinnest_network_is_as_far_as_it_goes(asked):
  """One, two and four channels: whatever lies beyond ends there or fails."""
  full = reference.parameters(110, (16, 32, 64), 100)
  thinnest = reference.parameters(110, (1, 2, 4), 100)
  member = solve([asked])[1]
  assert member.params == thinnest
  assert member.ratio == pytest.approx(1 - thinnest / full, abs=1e-12)


def test_given_widths_are_taken_as_they_are():
  members = members_of_widths((1.0, 0.25, 0.5), linear_cost)
  assert members == (
    Member("student_0", None, 0.0, 1.0, 1000, 7000),
    Member("student_1", None, 0.75, 0.25, 250, 1750),
    Member("student_2", None, 0.5, 0.5, 500, 3500),
  )


def test_costs_add_up():
  assert Cost(1, 20) + Cost(300, 4000) == Cost(301, 4020)


def test_of_widths_with_the_same_network_the_thinnest_is_taken():
  """Also where the nearest network is the smaller neighbour."""
  sizes = {0.25: 20, 0.5: 50, 0.6: 50, 0.7: 50, 0.8: 90, 0.9: 100, 1.0: 100}
  asked = []

  def cost(width):
    asked.append(width)
    return Cost(sizes[width], 0)

  for ratio, width in ((0.5, 0.5), (0.49, 0.5), (0.51, 0.5), (0.8, 0.25)):
    _, member = solve_widths((ratio,), cost, tuple(sizes))
    assert member.width == width
  with pytest.raises(UserError, match="the same network as student_1"):
    solve_widths((0.49, 0.51), cost, tuple(sizes))
  with pytest.raises(UserError, match="removes anything is 0.1000"):
    solve_widths((0.01,), cost, tuple(sizes))
