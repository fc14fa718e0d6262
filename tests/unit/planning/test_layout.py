"""Where ranks stand, compared with Megatron's own generator of groups."""

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.planning.layout import Layout


@pytest.mark.parametrize(
    "layout",
    [
        Layout(16, tp=2, pp=2, ep=4),
        Layout(32, tp=2, pp=2, cp=2, ep=2, etp=2),
        Layout(24, pp=3, ep=4),
        Layout(32, tp=2, pp=2, cp=2, ep=4, pp_before_dp=True),
    ],
    ids=Layout.text,
)
def test_places_are_those_of_megatrons_groups(layout):
    last = "pp-dp" if layout.pp_before_dp else "dp-pp"
    dense = RankGenerator(
        tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=f"tp-cp-ep-{last}"
    )
    experts = RankGenerator(
        tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=f"tp-cp-ep-{last}"
    )
    places = [layout.place(rank) for rank in range(layout.gpus)]
    for generator, names in ((dense, ("tp", "cp", "dp", "pp")), (experts, ("etp", "ep", "edp"))):
        for name in names:
            token = {"etp": "tp", "edp": "dp"}.get(name, name)
            for group in generator.get_ranks(token):
                assert [getattr(places[rank], name) for rank in group] == list(range(len(group)))
    for pp in range(layout.pp):
        first = layout.first_rank(pp)
        assert first == min(p.rank for p in places if p.pp == pp)


def test_gpus_that_cannot_be_laid_out_so():
    with pytest.raises(RecipeError, match=r"--gpus: 12 is no multiple of EP 8 = 8; give 8 or 16"):
        Layout(12, ep=8).check()
    Layout(12, ep=8).check(experts=False)
    with pytest.raises(RecipeError, match=r"TP 2 x PP 2 = 4; give 4, or"):
        Layout(3, tp=2, pp=2, etp=1).check()
