import jax
import pytest

from jaxml import kan

X = jax.random.normal(jax.random.key(0), (50, 3))


@pytest.mark.parametrize("style", ["graph", "matrix"])
def test_a_picture_is_written_whole(tmp_path, style):
    params = kan.fix(kan.init(jax.random.key(1), [3, (2, 1), 1]), 0, 0, 0, "sin")
    for name in ("a.png", "a.svg"):
        kan.plot(params, X, tmp_path / name, names=["a", "b", "c"], outputs=["y"], title="t", style=style)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg"]
    text = (tmp_path / "a.svg").read_text()
    assert text.rstrip().endswith("</svg>")


def test_pruned_edges_are_not_drawn():
    params = kan.init(jax.random.key(1), [3, 1])
    count = lambda p: sum(len(c.get_paths()) for c in kan.plot(p, X).axes[0].collections)
    assert count(kan.prune_edges(params, X, 0.5)) < count(params)


def test_wrong_names_and_files_are_told(tmp_path):
    params = kan.init(jax.random.key(1), [3, 1])
    with pytest.raises(ValueError, match="names are of 3"):
        kan.plot(params, X, names=["a"])
    with pytest.raises(ValueError, match="style is one of"):
        kan.plot(params, X, style="tree")
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf"):
        kan.plot(params, X, tmp_path / "a.jpeg")
