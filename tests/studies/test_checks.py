"""Plans that could not be run or compared are refused before the first run."""

import pytest

from routing_experts.errors import ConfigError
from routing_experts.studies.checks import check_whole_layers


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ([0.25, 0.3333], [0.3]),
        ([0.25], [0.25]),
        ([0.25], [0.25, 0.3333]),
        ([0.0833, 0.4167], [0.1, 0.2, 0.4]),
        ([0.1, 0.3], [0.1, 0.3]),
    ],
)
def test_rates_that_whole_layers_meet_or_enclose_are_taken(rates, wanted):
    check_whole_layers("static", rates, wanted, 12, 11)


@pytest.mark.parametrize(
    ("rates", "wanted", "message"),
    [
        ([0.3], [0.3], "drops 33.3% to 33.3% of 12 layers, .* cannot be compared at 30.0%.* 0.2500, 0.3333"),
        ([0.25], [0.4], "cannot be compared at 40.0%.* 0.3333, 0.4167"),
        ([0.04], [0.04], "rate 0.04 of 12 layers is less than half a layer"),
        ([1.0], [1.0], "is 12 layers, and 11 can be dropped"),
    ],
)
def test_rates_that_they_cannot_are_refused(rates, wanted, message):
    """Twelve layers have no three tenths: a rival that is in no table must not be trained for hours."""
    with pytest.raises(ConfigError, match=message):
        check_whole_layers("static", rates, wanted, 12, 11)
