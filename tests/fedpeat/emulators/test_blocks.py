from torch import nn

from fedpeat.emulators import Block, Blocks, Builder, chain, uniform


def row(*sources):
    return Blocks(tuple(Block(source, nn.Identity()) for source in sources))


def sources(blocks):
    return [block.source for block in blocks.blocks]


def test_builders_chain():
    backwards = Builder("backwards", {}, lambda blocks: Blocks(blocks.blocks[::-1], blocks.origin))
    both = chain(stages={"thin": uniform(kept_blocks=3), "turn": backwards})
    assert sources(both(row(2, 3, 4, 5, 6))) == [6, 4, 2]
    assert both.describe() == {
        "name": "chain",
        "stages": {"thin": {"name": "uniform", "kept_blocks": 3}, "turn": {"name": "backwards"}},
    }


def test_a_chain_of_one_does_what_the_one_does():
    assert sources(chain(stages={"thin": uniform(kept_blocks=2)})(row(1, 2, 3))) == sources(
        uniform(kept_blocks=2)(row(1, 2, 3))
    )


def test_builders_leave_what_they_get_alone():
    middle = row(1, 2, 3, 4)
    before = middle.blocks
    kept = uniform(kept_blocks=2)(middle)
    assert middle.blocks is before
    assert kept.blocks[0].module is before[0].module
    assert (len(middle), len(kept)) == (4, 2)
