"""Looks at held-out images come when they should."""

import pytest

from runs import Pull, images, trainer
from sslzoo.downstream.evaluate import Evaluate
from sslzoo.errors import UserError


def test_looks_come_every_few_epochs_and_at_the_end():
    seen = []

    def look(method):
        seen.append(method.trainer.current_epoch + 1)
        return {"map": len(seen) / 10, "worst": "cat"}

    evaluate = Evaluate(look, every=2)
    trainer(evaluate, max_epochs=5).fit(Pull(), datamodule=images())
    assert seen == [2, 4, 5]
    assert evaluate.state_dict() == {"values": {"map": 0.3, "worst": "cat"}}
    other = Evaluate(look)
    other.load_state_dict(evaluate.state_dict())
    assert other.values == evaluate.values


def test_no_epochs_between_looks_is_refused():
    with pytest.raises(UserError, match=r"task\.every_epochs=0 is no number of epochs"):
        Evaluate(lambda method: {}, every=0)
