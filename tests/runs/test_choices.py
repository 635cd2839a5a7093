"""A labelled task: who wrote this? Each model picks the likeliest author of each held-out text."""

import pytest

TASK = (
    'data.prompt_template="{text} by "',
    "data.answer_field=author",
    "data.choices=auto",
    "data.block_size=64",
    "baselines.local_only=true",
)
MODELS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in")


@pytest.fixture
def zero_shot(settings_of, tiny, model_folder):
    """What the full model picks before tuning, by hand: `zero_shot(*overrides, normalise="none")`."""
    from fedpeat.data import open_choices
    from fedpeat.models import load_model
    from fedpeat.server import choose
    from simulations.corpus import prepare_data

    def by_hand(*overrides, normalise="none"):
        data = prepare_data(settings_of(tiny(*overrides)))
        model = load_model(str(model_folder()), dtype="float32", attention="sdpa").model
        return choose(model, open_choices(data.folder), batch_size=16, threads=1, normalise=normalise).accuracy

    return by_hand


def test_every_model_picks_answers(run, zero_shot):
    ran = run(*TASK)
    right = {name: ran.summary["metrics"][name]["choice_accuracy"] for name in MODELS}
    assert right["full_zero_shot"] == zero_shot(*TASK)
    assert all(share * 3 == pytest.approx(round(share * 3)) for share in right.values()), "there are three texts"
    assert ran.summary["privacy_margin_accuracy"] == right["plug_in"] - right["emulator_tuned"]
    for number in (0, 2):
        found = ran.rounds[number]["evaluations"]
        margin = found["plug_in"]["choice_accuracy"] - found["emulator_tuned"]["choice_accuracy"]
        assert ran.rounds[number]["metrics"]["privacy_margin_accuracy"] == margin
    alone = ran.summary["baselines"]["local_only"]
    shares = [client["choice_accuracy"] for client in alone["clients"].values()]
    assert alone["mean"]["choice_accuracy"] == pytest.approx(sum(shares) / 3)


def test_picking_changes_nothing_else(run):
    ran, plain = run(*TASK), run(*(key for key in TASK if "choices" not in key))
    assert ran.digest == plain.digest
    assert ran.losses == plain.losses
    assert not any("choice_accuracy" in found for found in plain.summary["metrics"].values())


@pytest.mark.parametrize("more", ["evaluation.normalise=tokens", "data.choices=[zoe,eve,bob,ann]"])
def test_what_was_kept_of_another_way_to_pick_is_not_taken(more, run, zero_shot):
    from fedpeat.server import choices

    run(*TASK)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        real = choices.score
        patch.setattr(choices, "score", lambda *given, **keys: asked.append(given) or real(*given, **keys))
        ran = run(*TASK, more, "rounds=0")
    assert len(asked) == 4  # each of two models before tuning, and again with its PEFT attached
    overrides = TASK if "normalise" in more else (*TASK, more)
    found = ran.summary["metrics"]["full_zero_shot"]["choice_accuracy"]
    assert found == zero_shot(*overrides, normalise="tokens" if "normalise" in more else "none")
