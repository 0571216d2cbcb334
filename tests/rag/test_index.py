"""What is kept is found; what is gone is not; what is damaged is named."""

import json
import shutil

import numpy as np
import pytest

from jaxml import prompts
from jaxml.rag import Chunking, Folder, Hit, Index, Lexical, Passage, retrieve
from jaxml.testing import TinyEncoder as Words
from jaxml.testing import tiny_model

MANY = [Passage(f"text {i}", f"file {i % 7}") for i in range(60)]
VECTORS = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


def numbers(hits: list[list[Hit]]) -> list[list[int]]:
    return [[int(hit.passage.text.split()[1]) for hit in of] for of in hits]


@pytest.fixture(params=["float32", "float16", "codes", "qdrant"])
def store(request, tmp_path):
    if request.param == "qdrant":
        client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
        from jaxml.rag.qdrant import Qdrant

        return Qdrant.open(client, "passages", 8)
    options = dict(codes=True) if request.param == "codes" else dict(dtype=request.param)
    return Folder.create(tmp_path / "store", 8, **options)


def test_a_store_finds_what_was_added_and_not_deleted(store):
    assert store.search(VECTORS[:1], 3) == [[]] and len(store) == 0
    assert [store.add(MANY[a:b], VECTORS[a:b]) for a, b in ((0, 30), (20, 50), (40, 60))] == [30, 20, 10]
    assert store.delete([p.key for p in MANY[:5]] + ["0" * 32]) == 5 and len(store) == 55
    asked = VECTORS[10:14] + 0.1
    alive = np.arange(60) >= 5
    exact = np.argsort(-(asked @ VECTORS.T) + 1e9 * ~alive, 1)[:, :6]
    assert numbers(store.search(asked, 6)) == exact.tolist()
    np.testing.assert_allclose(
        [hit.score for hit in store.search(asked, 6)[0]], (asked @ VECTORS.T)[0][exact[0]], rtol=2e-3
    )
    assert {p.key for p in store.passages()} == {p.key for p in MANY[5:]}
    assert list(store.passages([MANY[9].key, MANY[7].key])) == [MANY[9], MANY[7]]
    with pytest.raises(KeyError, match="no passage has the key"):
        list(store.passages([MANY[0].key]))
    assert store.add(MANY[:2], VECTORS[:2]) == 2 and len(store) == 57  # what was deleted can come again
    if isinstance(store, Folder):
        again = Folder(store.path)
        store.compact()
        for one in (again, store, Folder(store.path)):
            assert len(one) == 57
        assert len(store.segments) == 1
        alive[:2] = True
        exact = np.argsort(-(asked @ VECTORS.T) + 1e9 * ~alive, 1)[:, :6]
        assert numbers(store.search(asked, 6)) == exact.tolist()
        with pytest.raises(ValueError, match="vectors are finite, that of a passage of file 0 is not"):
            store.add(MANY[:1], np.full((1, 8), np.nan))
        with pytest.raises(ValueError, match=r"vectors are \[1, 8\]"):
            store.add(MANY[:1], VECTORS[:2])
        with pytest.raises(FileExistsError, match="a store is there"):
            Folder.create(store.path, 8)


def test_an_addition_that_was_cut_off_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = Folder.create(tmp_path / "store", 8)
    store.add(MANY[:10], VECTORS[:10])
    for moment in ("jaxml.rag.store._save", "jaxml.log.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(moment, lambda *_: (_ for _ in ()).throw(OSError("no space")))
            with pytest.raises(OSError, match="no space"):
                store.add(MANY[10:20], VECTORS[10:20])
        store = Folder(tmp_path / "store")
        assert len(store) == 10 and numbers(store.search(VECTORS[3:4], 1)) == [[3]]
    assert store.add(MANY[10:20], VECTORS[10:20]) == 10
    assert numbers(Folder(tmp_path / "store").search(VECTORS[12:13], 1)) == [[12]]


def test_damaged_files_are_named(tmp_path):
    whole = tmp_path / "whole"
    store = Folder.create(whole, 8, codes=True)
    store.add(MANY, VECTORS)
    store.delete([MANY[0].key])
    segment = store.segments[0].path.name
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) == 8
    for name in files:
        for cut in (0.5, 0.0, None):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            data = (copy / name).read_bytes()
            (copy / name).unlink()
            if cut is not None:
                (copy / name).write_bytes(data[: int(len(data) * cut)])
            with pytest.raises((ValueError, FileNotFoundError), match=name.name):
                Folder(copy)
    for key, value in (("format", 9), ("segments", [{"name": "../x", "count": 1, "dead": None}]), ("width", "8")):
        about = json.loads((whole / "store.json").read_text())
        (copy / "store.json").write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match="store of format 1"):
            Folder(copy)
    assert segment in str(files)
    shutil.rmtree(copy)
    shutil.copytree(whole, copy)
    lines = (copy / segment / "passages.jsonl").read_text()
    (copy / segment / "passages.jsonl").write_text(lines.replace('"page": 0', '"page":""'))
    with pytest.raises(ValueError, match="a passage's page is of type int"):
        list(Folder(copy).passages())


# ---- words ------------------------------------------------------------------------------------------


def test_words_that_are_rare_count_most(tmp_path):
    made = Lexical.build([Passage("the cat and the dog", "a"), Passage("the cat", "b"), Passage("the zebra", "c")])
    [cat, zebra, none, nothing] = made.search(["cat", "the zebra", "giraffe", ""], 9)
    assert [key for key, _ in cat] == [made.keys[1].decode(), made.keys[0].decode()]
    assert zebra[0][0] == made.keys[2].decode() and none == nothing == []
    made.save(tmp_path / "words", "1")
    again = Lexical.load(tmp_path / "words", "1")
    assert again.search(["the zebra"], 2) == made.search(["the zebra"], 2)
    assert Lexical.load(tmp_path / "words", "2") is None and Lexical.load(tmp_path / "none", "1") is None
    (tmp_path / "words" / "keys.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        Lexical.load(tmp_path / "words", "1")
    with pytest.raises(ValueError, match="at least one passage"):
        Lexical.build([])


@pytest.mark.parametrize(
    "name, change",
    [
        ("indices.csc.index.npy", lambda a: a + 9),
        ("indices.csc.index.npy", lambda a: -a - 1),
        ("indptr.csc.index.npy", lambda a: a[::-1].copy()),
        ("indptr.csc.index.npy", lambda a: a * 1000),
        ("data.csc.index.npy", lambda a: a[:-1]),
        ("keys.npy", lambda a: a.astype("S31")),
        ("vocab.index.json", lambda a: a | {"zebra": 10**9}),
        ("vocab.index.json", lambda a: a | {"zebra": "x"}),
        ("params.index.json", lambda a: a | {"nothing": 1}),
        ("params.index.json", lambda a: []),
        ("stamp.json", lambda a: a | {"count": 3.0}),
    ],
)
def test_words_that_point_beyond_their_tables_are_refused(tmp_path, name, change):
    made = Lexical.build([Passage("the cat and the dog", "a"), Passage("the cat", "b"), Passage("the zebra", "c")])
    made.save(tmp_path / "words", "1")
    path = tmp_path / "words" / name
    if path.suffix == ".npy":
        np.save(path, change(np.load(path)))
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"damaged .* Remove it"):
        Lexical.load(tmp_path / "words", "1")


def test_what_a_folder_says_of_how_words_count_is_not_heard(tmp_path):
    made = Lexical.build([Passage("the cat and the dog", "a"), Passage("the zebra", "c")])
    made.save(tmp_path / "words", "1")
    path = tmp_path / "words" / "params.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "bm25l", "backend": "numba", "num_docs": 99}))
    assert Lexical.load(tmp_path / "words", "1").search(["zebra"], 2) == made.search(["zebra"], 2)


# ---- rankings ---------------------------------------------------------------------------------------


def test_a_passage_that_both_rankings_like_comes_first():
    a, b, c = (Passage(t, "x") for t in "abc")
    fused = retrieve.fuse([[Hit(a, 9), Hit(b, 8)], [Hit(c, 1), Hit(b, 0.5)]])
    assert [hit.passage for hit in fused] == [b, a, c]
    assert fused[0].score == pytest.approx(2 / 62)


def test_chosen_passages_differ(words):
    hits = [Hit(Passage(t, "x"), 0.0) for t in ("a b c", "a b c d", "a q")]
    assert [h.passage.text for h in retrieve.diverse(words, "a b c", hits, 2, trade=1.0)] == ["a b c", "a b c d"]
    assert [h.passage.text for h in retrieve.diverse(words, "a b c", hits, 2, trade=0.4)] == ["a b c", "a q"]
    assert retrieve.diverse(words, "a", [], 2) == []


def test_a_decoder_orders_by_how_likely_the_question_is():
    llm = prompts.Local(tiny_model())
    hits = [Hit(Passage(t, "x"), 0.0) for t in ("one thing.", "an other.")]
    found = retrieve.likely(llm, "what?", hits)
    asked = [f"{hit.passage.text}\n\nA question that this text answers:" for hit in found]
    scores = llm.score(asked, [[" what?"]] * 2)
    assert [h.score for h in found] == pytest.approx([s.log_probs[0] / s.tokens[0] for s in scores])
    assert found[0].score >= found[1].score


# ---- index ------------------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Lights\n\nAda keeps the lighthouse.\n\n# Boats\n\nBob has a boat.\n")
    (folder / "b.txt").write_text("Carl bakes bread.")
    return folder


def test_an_index_follows_its_folder(tmp_path, docs, words):
    index = Index.create(tmp_path / "index", words)
    told = []
    changes = index.update(docs, tick=lambda *n: told.append(n))
    assert (changes.added, changes.passages, len(index)) == (2, 3, 3) and told == [(1, 2), (2, 2)]
    for how in ("dense", "lexical", "hybrid"):
        [[hit]] = index.search(["who keeps the lighthouse?"], 1, how=how)
        assert hit.passage.text == "Ada keeps the lighthouse." and hit.passage.title == "Lights"
    assert index.update(docs).unchanged == 2
    (docs / "b.txt").write_text("Carl bakes cakes.")
    (docs / "a.md").unlink()
    (docs / "c.jsonl").write_text('{"text": "Dora sings.", "source": "radio"}\n')
    (docs / "bad.pdf").write_bytes(b"nothing")
    changes = Index(tmp_path / "index", words).update(docs)
    assert (changes.added, changes.changed, changes.removed) == (1, 1, 1)
    assert len(changes.refused) == 1 and "bad.pdf: this PDF cannot be read" in changes.refused[0]
    index = Index(tmp_path / "index", words)
    assert {hit.passage.text for hit in index.search(["Carl sings"], 9)[0]} == {"Carl bakes cakes.", "Dora sings."}
    assert index.search(["lighthouse"], 9, how="lexical") == [[]]
    assert index.search(["who sings?"], 1)[0][0].passage.source == "radio"


def test_an_update_that_was_stopped_goes_on(tmp_path, docs, words, monkeypatch):
    monkeypatch.setattr("jaxml.rag.index.PART", 2)
    index = Index.create(tmp_path / "index", words)

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.update(docs, tick=stop)
    index = Index(tmp_path / "index", words)
    assert len(index) == 2
    changes = index.update(docs)
    assert (changes.added, changes.passages, len(index)) == (2, 1, 3)
    assert index.update(docs).unchanged == 2


def test_a_broken_file_after_a_whole_one_leaves_nothing_of_itself(tmp_path, words, monkeypatch):
    monkeypatch.setattr("jaxml.rag.index.PART", 4)
    (folder := tmp_path / "docs").mkdir()
    line = lambda name, i: json.dumps({"text": f"{name} {i}"}) + "\n"
    (folder / "a.jsonl").write_text("".join(line("whole", i) for i in range(3)))
    (folder / "b.jsonl").write_text("".join(line("broken", i) for i in range(4)) + "{")
    index = Index.create(tmp_path / "index", words)
    changes = index.update(folder)
    assert changes.added == 1 and len(changes.refused) == 1
    assert sorted(p.text for p in index.store.passages()) == ["whole 0", "whole 1", "whole 2"]


def test_a_passage_stays_while_a_file_holds_it(tmp_path, words):
    index, folder = Index.create(tmp_path / "index", words), tmp_path / "docs"
    folder.mkdir()
    row = json.dumps({"text": "Ada keeps the lighthouse.", "source": "radio"}) + "\n"
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(row)
    assert index.update(folder).added == 2 and len(index) == 1
    (folder / "a.jsonl").unlink()
    assert index.update(folder).removed == 1 and len(index) == 1
    (folder / "c.jsonl").write_text(row + "{")
    assert index.update(folder).refused and len(index) == 1
    (folder / "b.jsonl").write_text('{"text": "Bob has a boat."}\n')
    assert index.update(folder).changed == 1
    assert [hit.passage.text for hit in index.search(["Ada"], 5)[0]] == ["Bob has a boat."]


def test_a_file_that_breaks_in_the_middle_leaves_nothing(tmp_path, words, monkeypatch):
    monkeypatch.setattr("jaxml.rag.index.PART", 2)
    index = Index.create(tmp_path / "index", words)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    assert "line 6" in index.update(tmp_path / "a.jsonl").refused[0] and len(index) == 0
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert index.update(tmp_path / "a.jsonl").added == 1 and len(index) == 5
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:4], '{"text": "new"}', "{"]))
    assert index.update(tmp_path / "a.jsonl").refused and len(index) == 5  # what was known of it stays


def test_files_are_known_wherever_they_are_named_from(tmp_path, docs, words, monkeypatch):
    index = Index.create(tmp_path / "index", words)
    monkeypatch.chdir(tmp_path)
    assert index.update("docs").added == 2
    assert index.update(docs).unchanged == 2 and len(index) == 3
    monkeypatch.chdir(docs)
    assert index.update(".").unchanged == 2 and len(index) == 3
    (docs / "a.md").unlink()
    (docs / "b.txt").unlink()
    assert index.update(".").removed == 2 and len(index) == 0  # though nothing is left to read
    with pytest.raises(ValueError, match="no file to read"):
        index.update(".")


def test_what_an_interrupted_update_read_is_not_forgotten(tmp_path, words, monkeypatch):
    monkeypatch.setattr("jaxml.rag.index.PART", 2)
    index, path = Index.create(tmp_path / "index", words), tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    add, count = index.add, []

    def dies(passages):
        count.append(len(passages))
        if len(count) == 3:
            raise KeyboardInterrupt
        return add(passages)

    monkeypatch.setattr(index, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        index.update(path)
    path.write_text('{"text": "another row"}\n')
    index = Index(tmp_path / "index", words)
    assert len(index) == 4 and index.update(path).added == 1 and len(index) == 1
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Index(tmp_path / "index", words).update(tmp_path / "none")
    assert index.update(path).removed == 1 and len(index) == 0


def test_two_processes_do_not_spoil_an_index(tmp_path, docs, words):
    mine, other = Index.create(tmp_path / "index", words), Index(tmp_path / "index", words)
    mine.update(docs)
    assert other.search(["lighthouse"], 1)[0][0].passage.title == "Lights"  # what the other has done is seen
    (docs / "c.txt").write_text("Dora sings.")
    other.update(docs)
    mine.store.compact()
    assert len(other) == len(mine) == 4 and other.search(["Dora sings"], 1)[0][0].passage.text == "Dora sings."
    seen = []

    def meanwhile(*_):
        with pytest.raises(ValueError, match="another process is changing this index"):
            other.update(docs)
        seen.append(1)

    mine.update(docs, tick=meanwhile)
    assert seen


def test_passages_without_words_are_found_by_meaning_alone(tmp_path, words):
    index = Index.create(tmp_path / "index", words)
    index.add([Passage("???", "a"), Passage("!!!", "b")])
    assert len(index.search(["???"], 2)[0]) == 2 and index.search(["???"], 2, how="lexical") == [[]]
    (tmp_path / "index" / "lexical" / "keys.npy").write_bytes(b"x")
    assert len(Index(tmp_path / "index", words).search(["???"], 2)[0]) == 2  # damaged words are made again


@pytest.mark.parametrize(
    "about", ["x", {"file": "a"}, {"file": 1, "hash": "", "keys": []}, {"file": "a", "hash": "", "keys": "ab"}]
)
def test_what_is_known_of_files_is_checked(tmp_path, docs, words, about):
    index = Index.create(tmp_path / "index", words)
    index.update(docs)
    with prompts.Store(tmp_path / "index" / "files.jsonl") as kept:
        kept.put("new", about)
    with pytest.raises(ValueError, match="a file has a name, a hash and keys"):
        Index(tmp_path / "index", words).update(docs)


@pytest.mark.parametrize("chunking", [{"size": "x"}, {"size": 0}, {"length": 9}, [], {"size": 1.5, "overlap": 0}])
def test_an_index_says_how_long_its_passages_are(tmp_path, words, chunking):
    Index.create(tmp_path / "index", words)
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunking": chunking}))
    with pytest.raises(ValueError, match="damaged"):
        Index(tmp_path / "index", words)


def test_what_a_killed_update_did_not_delete_is_deleted_by_the_next(tmp_path, docs, words, monkeypatch):
    index = Index.create(tmp_path / "index", words)
    (docs / "secret.txt").write_text("The secret is a zebra.")
    index.update(docs)
    (docs / "secret.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index.update(docs)
    again = Index(tmp_path / "index", words)
    assert again.update(docs).removed == 1
    assert all("zebra" not in hit.passage.text for hit in again.search(["zebra"], 9)[0])


def test_words_of_passages_that_are_gone_are_told(tmp_path, docs, words):
    index = Index.create(tmp_path / "index", words)
    index.update(docs)
    index.lexical.keys[:] = b"0" * 32
    with pytest.raises(ValueError, match="names a passage that is not there"):
        index.search(["bread"], 1, how="lexical")


def test_a_changed_collection_elsewhere_is_read_anew(tmp_path, docs, words):
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    from jaxml.rag.qdrant import Qdrant

    index = Index.create(tmp_path / "index", words, store=Qdrant.open(client, "p", words.width))
    index.update(docs)
    assert index.search(["bread"], 1)[0][0].passage.text == "Carl bakes bread."
    (docs / "b.txt").write_text("Carl bakes cakes.")
    index.update(docs)
    assert index.search(["cakes"], 1)[0][0].passage.text == "Carl bakes cakes."


def test_an_index_of_another_encoder_is_refused(tmp_path, docs, words):
    Index.create(tmp_path / "index", words, Chunking(50, 5)).update(docs)
    with pytest.raises(ValueError, match="made by the encoder"):
        Index(tmp_path / "index", Words(seed=1))
    assert Index(tmp_path / "index", words).chunking == Chunking(50, 5)
    with pytest.raises(FileExistsError, match="an index is there"):
        Index.create(tmp_path / "index", words)
    with pytest.raises(FileNotFoundError, match="no index there"):
        Index(tmp_path / "none", words)
    (tmp_path / "index" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Index(tmp_path / "index", words)


def test_wrong_searches_are_refused(tmp_path, words):
    index = Index.create(tmp_path / "index", words)
    assert index.search(["a"], 2) == [[]] and index.search([], 2) == []
    for wrong in (dict(how="magic"), dict(k=0)):
        with pytest.raises(ValueError, match=r"Index\.search: how is one of"):
            index.search(["a"], **wrong)
    with pytest.raises(ValueError, match="questions are a list"):
        index.search("a")
