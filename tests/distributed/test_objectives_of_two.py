"""Learned rates and R-Drop on two processes: the plain loop's masks, gradients, rates, weights."""

import pytest

OBJECTIVES = ("dropout.hidden={rate: 0.2, learned: true}", "train.r_drop_alpha=1.0")


@pytest.mark.drill
def test_learned_rates_and_r_drop_of_two_processes_are_those_of_the_plain_loop(folder):
    assert folder.verify_sync("ddp:2", *OBJECTIVES) == [("ddp:2", "equal", [])]


@pytest.mark.drill
def test_an_engine_that_cuts_weights_up_refuses_learned_rates_before_it_writes(folder):
    ended = folder.train("learned-fsdp2", *OBJECTIVES, engine="fsdp2")
    assert ended.code == 2, ended.text
    assert ended.text.count("learned rates were asked for on FSDP2") == 1
    assert not folder.run("learned-fsdp2").exists()
