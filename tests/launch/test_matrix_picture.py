"""The picture of a matrix: a well-formed SVG, whatever the names and figures."""

import math
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from sigmoe.launch.matrix_picture import draw_matrix

SVG = "{http://www.w3.org/2000/svg}"


def fills(picture):
    """The colours of the cells, row by row."""
    styles = [path.get("style", "") for path in ElementTree.fromstring(picture).iter(f"{SVG}path")]
    return [style.split(";")[0].removeprefix("fill: ") for style in styles if "stroke: #ffffff" in style]


def test_a_cell_is_as_dark_as_it_is_close_to_the_best_of_its_column():
    colours = fills(draw_matrix(["a", "b", "c"], ["x", "y"], [[2.0, 9.0], [2.5, 4.5], [8.0, 5.625]]))
    darkness = [-sum(bytes.fromhex(colour[1:])) for colour in colours]
    x, y = darkness[::2], darkness[1::2]
    assert x[0] > x[1] > x[2]
    # Only the ratio to the column's best counts.
    assert (y[1], y[2], y[0]) == tuple(x)


def test_what_is_no_number_is_a_dash():
    picture = draw_matrix(["a", "b"], ["x", "y"], [[math.nan, math.nan], [2.0, math.nan]])
    colours = fills(picture)
    assert len(colours) == 4
    assert colours[2] != colours[0] == colours[1] == colours[3]
    assert b"nan" not in picture


@pytest.mark.parametrize("name", ["runs/$x$_1^2", "<a&b>", "a_name_of_a_domain_that_goes_on", "法律"])
def test_odd_names(name, recwarn):
    picture = draw_matrix([name, "b"], ["x", name], [[1.0, 2.0], [3.0, 4.0]])
    ElementTree.fromstring(picture)
    # Only what matplotlib's font lacks is left to the viewer's.
    assert (b"<text" in picture) == (name == "法律")
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


def test_settings_of_the_users_do_not_show():
    plain = draw_matrix(["a"], ["x"], [[1.5]])
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "axes.facecolor": "red"}):
        assert draw_matrix(["a"], ["x"], [[1.5]]) == plain
        assert matplotlib.rcParams["font.size"] == 30
