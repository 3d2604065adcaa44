"""Microbatches side by side: the same sums as one after the other, and nothing made twice."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn

from sfumato.train.lanes import Feed, Lanes, dealt, lane_count, short_turns


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def work(net: nn.Module, part: int) -> int:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(part))
    net(x).square().sum().backward()
    return part * part


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lanes_add_up_what_one_network_gathers(count):
    parts = range(2, 8)
    alone = network()
    for part in parts:
        work(alone, part)
    lanes = Lanes(network(), count)
    assert lanes.run(work, parts) == [part * part for part in parts]
    for a, b in zip(lanes.networks[0].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert all(p.grad is None for net in lanes.networks[1:] for p in net.parameters())
    lanes.close()


def test_lanes_sum_in_the_same_order_every_time():
    grads = []
    for _ in range(3):
        lanes = Lanes(network(), 2)
        lanes.run(work, range(7))
        grads.append([p.grad for p in lanes.networks[0].parameters()])
        lanes.close()
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_lanes_see_weights_that_change():
    lanes = Lanes(network(), 2)
    with torch.no_grad():
        for parameter in lanes.networks[0].parameters():
            parameter.add_(1)
    for a, b in zip(lanes.networks[0].parameters(), lanes.networks[1].parameters(), strict=True):
        assert torch.equal(a, b)
    lanes.close()


def test_a_failing_part_is_heard_of():
    def fail(net: nn.Module, part: int) -> None:
        raise ValueError(f"part {part}")

    lanes = Lanes(network(), 2)
    with pytest.raises(ValueError, match="part"):
        lanes.run(fail, range(4))
    lanes.close()


def test_nothing_is_left_of_a_step_that_failed():
    def fail(net: nn.Module, part: int) -> None:
        work(net, part)
        if part == 0:
            raise ValueError("part 0")

    lanes = Lanes(network(), 2)
    with pytest.raises(ValueError, match="part 0"):
        lanes.run(fail, range(4))
    assert all(p.grad is None for p in lanes.networks[1].parameters())
    lanes.close()


def test_a_weight_that_only_one_lane_used_gets_its_gradient():
    lanes = Lanes(nn.Linear(2, 2), 2)

    def use(net: nn.Module, part: int) -> None:
        if part == 1:  # the second lane's
            net(torch.ones(1, 2)).sum().backward()

    lanes.run(use, range(2))
    assert torch.equal(lanes.networks[0].bias.grad, torch.ones(2))
    lanes.close()


def test_a_new_kind_of_batch_has_the_network_to_itself():
    lanes = Lanes(network(), 3)
    with lanes.turn("known"):
        pass
    inside, leave, entered = threading.Event(), threading.Event(), threading.Event()

    def first(kind: str) -> None:
        with lanes.turn(kind):
            inside.set()
            assert leave.wait(30)

    def second() -> None:
        with lanes.turn("known"):
            entered.set()

    one = threading.Thread(target=first, args=("new",))
    one.start()
    assert inside.wait(30)
    two = threading.Thread(target=second)
    two.start()
    assert not entered.wait(0.2)  # a lane that need not wait is in at once
    leave.set()
    assert entered.wait(30)
    one.join()
    two.join()
    lanes.close()


def test_known_kinds_work_together():
    lanes, together = Lanes(network(), 3), threading.Barrier(3, timeout=30)
    with lanes.turn("known"):
        pass

    def meet(net: nn.Module, part: int) -> None:
        with lanes.turn("known"):
            together.wait()

    lanes.run(meet, range(3))
    lanes.close()


def test_other_threads_keep_their_number_of_threads():
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        lanes = Lanes(network(), 4)
        assert lanes.run(lambda net, part: torch.get_num_threads(), range(4)) == [1, 1, 1, 1]
        lanes.close()
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [4]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_parts_that_grow_are_dealt_there_and_back():
    assert dealt(range(8), 2) == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert dealt(range(3), 2) == [[0], [1, 2]]
    assert dealt(range(4, 6), 1) == [[4, 5]]


def test_lanes_are_as_many_as_parts_and_threads_divide_into():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert [lane_count(torch.device("cpu"), parts) for parts in (1, 2, 6, 8, 7)] == [1, 2, 2, 4, 1]
        assert lane_count(torch.device("cuda"), 8) == 1
    finally:
        torch.set_num_threads(before)


def test_a_feed_makes_each_batch_once_and_ahead():
    made, begun = [], {(1, 4): threading.Event(), (2, 2): threading.Event()}

    def make(step: int, part: int) -> tuple[int, int]:
        made.append((step, part))
        if (step, part) in begun:
            begun[step, part].set()
        return step, part

    feed = Feed(make, range(2, 5), last_step=2, ahead=2)
    wanted = [(step, part) for step in (1, 2) for part in (2, 4, 3)]  # lanes do not ask in order
    assert feed.take(1, 2) == (1, 2)
    assert begun[1, 4].wait(30)
    assert not begun[2, 2].is_set()
    assert [feed.take(*key) for key in wanted[1:]] == wanted[1:]
    assert sorted(made) == sorted(wanted)
    feed.close()


def test_turns_are_short_for_a_while():
    before = sys.getswitchinterval()
    with short_turns(), short_turns():
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == pytest.approx(before, abs=2e-6)
