"""torch_utils.stats: values are pooled by name and over processes, and restored exactly."""

import io
import math

import pytest
import torch

from torch_utils.stats import Collector


def test_flush_pools_values_of_all_calls_by_name():
    collector = Collector()
    collector.add("b", torch.tensor([1.0, 2.0]))
    collector.add("a", torch.tensor([[5.0]]))
    collector.add("b", torch.tensor([6.0]))
    found = collector.flush()
    assert list(found) == ["a", "b"]
    assert found["a"] == {"num": 1, "mean": 5.0, "std": 0.0}
    assert found["b"] == {"num": 3, "mean": 3.0, "std": pytest.approx(math.sqrt((4 + 1 + 9) / 3), rel=1e-15)}


def test_flush_starts_anew():
    collector = Collector()
    collector.add("a", torch.ones(3))
    collector.flush()
    assert collector.flush() == {}
    collector.add("a", torch.zeros(2))
    assert collector.flush() == {"a": {"num": 2, "mean": 0.0, "std": 0.0}}


@pytest.mark.parametrize("values", [
    torch.full([1000], 0.1), torch.full([7], 1e4, dtype=torch.float16), torch.full([9], -3, dtype=torch.int64),
])
def test_flush_equal_values_have_no_spread(values):
    collector = Collector()
    collector.add("a", values)
    entry = collector.flush()["a"]
    assert entry["mean"] == pytest.approx(values[0].item(), rel=1e-12)
    assert entry["std"] <= 1e-7 * abs(entry["mean"])  # the root of float64's rounding


def test_add_many_small_float32_values_loses_nothing():
    collector = Collector()
    collector.add("a", torch.tensor([2.0**24]))
    for _ in range(100):
        collector.add("a", torch.ones(1))  # would vanish in a float32 sum
    assert collector.flush()["a"]["mean"] * 101 == pytest.approx(2**24 + 100, rel=1e-15)


def test_add_keeps_no_graph_and_does_not_touch_values():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    collector = Collector()
    collector.add("a", values * 2)
    assert not collector.state_dict()["moments"].requires_grad
    assert values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_flush_values_that_are_not_finite_show(bad):
    collector = Collector()
    collector.add("a", torch.tensor([1.0, bad]))
    collector.add("b", torch.tensor([1.0]))
    found = collector.flush()
    assert not math.isfinite(found["a"]["mean"])
    assert math.isnan(found["a"]["std"])
    assert found["b"]["mean"] == 1.0


def test_flush_name_without_a_value_is_left_out():
    collector = Collector()
    collector.add("a", torch.zeros(0))
    assert collector.flush() == {}


def test_state_saved_within_a_tick_gives_the_same_bits(tmp_path):
    values = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    whole, first, second = Collector(), Collector(), Collector()
    for part in values:
        whole.add("a", part)
    for part in values[:3]:
        first.add("a", part)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.add("a", torch.ones(9))  # forgotten
    second.load_state_dict(torch.load(file, weights_only=True))
    for part in values[3:]:
        first.add("a", part)
        second.add("a", part)
    expected = whole.flush()
    assert first.flush() == expected  # saving changes nothing
    assert second.flush() == expected


def test_load_state_dict_does_not_share_memory_with_what_was_saved():
    collector, other = Collector(), Collector()
    collector.add("a", torch.ones(2))
    saved = collector.state_dict()
    other.load_state_dict(saved)
    other.add("a", torch.ones(2))
    assert saved["moments"].tolist() == [[[2.0, 2.0, 2.0]]]


class Together:
    """Two collectors that share their sums: `reduce` of one process is called after that of the other."""

    def __init__(self, added):
        self.rows, self.collectors = [], []
        for rank, values in enumerate(added):
            collector = Collector(reduce=self.reduce, rank=rank, num_processes=len(added))
            for name, value in values:
                collector.add(name, value)
            self.collectors.append(collector)

    def reduce(self, tensor):
        self.rows.append(tensor)
        return sum(self.rows)

    def last(self, method):
        """Call a method on all; the sum of the last one has all parts."""
        self.rows = []
        return [getattr(collector, method)() for collector in self.collectors][-1]


TWO = [[("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([4.0]))],
       [("b", torch.tensor([8.0])), ("a", torch.tensor([6.0]))]]


def test_flush_of_two_processes_pools_both():
    found = Together(TWO).last("flush")
    assert found == {"a": {"num": 3, "mean": 3.0, "std": pytest.approx(math.sqrt(14 / 3), rel=1e-15)},
                     "b": {"num": 2, "mean": 6.0, "std": 2.0}}


def test_state_dict_of_two_processes_keeps_each_ones_part():
    saved = Together(TWO).last("state_dict")
    assert saved["names"] == ["a", "b"]
    assert saved["moments"].tolist() == [[[2, 3, 5], [1, 4, 16]], [[1, 6, 36], [1, 8, 64]]]
    again = Together([[], []])
    for collector in again.collectors:
        collector.load_state_dict(saved)
    assert again.last("flush") == Together(TWO).last("flush")


@pytest.mark.parametrize("num_processes", [1, 3])
def test_load_state_dict_of_another_number_of_processes_loses_nothing(num_processes):
    saved = Together(TWO).last("state_dict")
    if num_processes == 1:
        collector = Collector()
        collector.load_state_dict(saved)
        found = collector.flush()
    else:
        again = Together([[]] * num_processes)
        for collector in again.collectors:
            collector.load_state_dict(saved)
        found = again.last("flush")
    assert found == Together(TWO).last("flush")


@pytest.mark.parametrize("saved", [
    {}, {"names": ["a"]}, {"names": ["a"], "moments": torch.zeros(1, 2, 3)},
    {"names": "a", "moments": torch.zeros(1, 1, 3)},
])
def test_load_state_dict_of_something_else_raises(saved):
    with pytest.raises(ValueError, match=r"have no names with moments \[processes, names, 3\]"):
        Collector().load_state_dict(saved)


def test_collector_of_several_processes_without_a_sum_raises():
    with pytest.raises(ValueError, match="num_processes is 2 without reduce"):
        Collector(num_processes=2)
    with pytest.raises(ValueError, match="num_processes is 1 with reduce"):
        Collector(reduce=lambda tensor: tensor)
    with pytest.raises(ValueError, match="rank is 2 of 2 processes; expected 0 to 1"):
        Collector(reduce=lambda tensor: tensor, rank=2, num_processes=2)
