"""``krony inspect --report``: a page and its figures, or one sentence."""

FEW = ("--text", "python-docs", "--text-tokens", 256, "--ablation-tokens", 64)


def test_a_page_and_its_figures(krony, compressed, tmp_path):
    done = krony("inspect", compressed, *FEW, "--report", tmp_path / "page.html", "--json", "-")
    assert done.code == 0, done.err
    factors = done.json["factors"]
    assert factors["text"] == "python-docs" and factors["tokens"] == 256 and len(factors["layers"]) == 6
    assert len(done.json["layers"]) == 6  # what inspect says without a text is there too
    page = (tmp_path / "page.html").read_text()
    assert all(f"{layer['factors'][0]['ratio']:.3f}" in page for layer in factors["layers"])
    assert [p.name for p in tmp_path.iterdir() if "page" in p.name] == ["page.html"]


def test_a_table_without_a_page(krony, compressed):
    done = krony("inspect", compressed, *FEW)
    assert done.code == 0 and "effective rank of A" in done.out and "256 tokens of python-docs" in done.out


def test_pages_that_cannot_be_made(refused, compressed, gpt2_folder, tmp_path):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    page = ("--report", tmp_path / "p.html")
    assert "there.html exists" in refused("inspect", compressed, "--report", tmp_path / "there.html")
    assert "there is no folder" in refused("inspect", compressed, "--report", tmp_path / "none/p.html")
    assert "can't be written" in refused("inspect", compressed, "--report", "/proc/p.html")
    assert "the name ends in .html" in refused("inspect", compressed, "--report", tmp_path / "p.txt")
    assert "nothing in this model is compressed" in refused("inspect", gpt2_folder, *page)
    assert "empty.txt is empty" in refused("inspect", compressed, *page, "--text", tmp_path / "empty.txt")
    assert "no.txt can't be read" in refused("inspect", compressed, *page, "--text", tmp_path / "no.txt")
    assert "there is no such folder" in refused("inspect", compressed, *page, "--base", tmp_path / "none")
    for option in ("--text-tokens", "--ablation-tokens"):
        assert f"leave {option} out" in refused("inspect", compressed, "--base", gpt2_folder, option, 512)
    assert "leave --text out" in refused("inspect", compressed, "--trajectory", "--text", "python-docs")
    assert (tmp_path / "there.html").read_text() == "mine" and not (tmp_path / "p.html").exists()
