"""Four runs whose right next step is known get it, each another; how they are made is in contrived.py."""
import pytest
from contrived import CASES

from finetune_accel.core.findings import findings_of
from finetune_accel.core.next_steps import next_steps
from finetune_accel.core.runs import RunFolder


@pytest.fixture(scope="module")
def advice(tmp_path_factory):
    """{case: NextSteps} of the four runs."""
    made = {case: make(tmp_path_factory.mktemp("contrived")) for case, (make, _) in CASES.items()}
    return {case: next_steps(findings_of(RunFolder(folder), 17)) for case, folder in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_right_step_comes_first(advice, case):
    assert advice[case].advised[0].step == CASES[case][1], [(one.step, one.gain) for one in advice[case].advised]


def test_the_advice_differs_and_each_sentence_holds_a_figure(advice):
    assert len({one.advised[0].step for one in advice.values()}) == len(advice)
    for steps in advice.values():
        assert all(any(sign.isdigit() for sign in figure.says) and figure.file.endswith(".json") for figure in steps.advised[0].because)
