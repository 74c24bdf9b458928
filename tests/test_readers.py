"""Readers of data files: every format against the same rows, and everything that can be wrong with a row or a file."""
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unify_rl.core import TASKS, UserError
from unify_rl.data.readers import ALL, FIELDS, SOURCES, FilePrompt, Picture, decode, files_of, options_in
from unify_rl.data.stream import MODULES, PromptStream, Reading, load_prompts, own_outputs
from unify_rl.rewards.verifiable import build_rewards, check_prompts

FIXTURES = Path(__file__).parent/"fixtures"
PLAIN = ("jsonl", "parquet", "webdataset", "huggingface")


def png(size=(8, 6), color=(200, 30, 30), mode="RGB", kind="png", **kwargs):
    Image.new(mode, size, color).save(out := io.BytesIO(), kind, **kwargs)
    return out.getvalue()


def read(source, path, tasks=TASKS, split="train", **settings):
    "(prompts, reading) of a source."
    reading = Reading(**settings)
    return load_prompts(source, split, tasks, str(path), reading), reading


def why(source, path, tasks=TASKS, **settings):
    "The error of a source."
    with pytest.raises(UserError) as e: read(source, path, tasks, **settings)
    return str(e.value)


# ---- writers: a list of plain rows with encoded pictures, as a data set of each format ----

def write_jsonl(folder, rows):
    folder.mkdir(exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        if isinstance(row, bytes): lines.append(row); continue
        row = dict(row)
        for f in ("image", "reference"):
            if isinstance(row.get(f), bytes):
                (folder/f"{i}-{f}.png").write_bytes(row[f])
                row[f] = f"{i}-{f}.png"
        lines.append(json.dumps(row).encode())
    (folder/"train.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def table(rows): return pa.Table.from_pylist([{k: r.get(k) for k in dict.fromkeys(k for r in rows for k in r)} for r in rows])


def write_parquet(folder, rows):
    folder.mkdir(exist_ok=True)
    pq.write_table(table(rows), folder/"train.parquet")


def write_huggingface(folder, rows):
    folder.mkdir(exist_ok=True)
    t = table([{k: {"bytes": v, "path": None} if isinstance(v, bytes) and k in ("image", "reference") else v for k, v in r.items()} for r in rows])
    with pa.OSFile(str(folder/"data-00000-of-00001.arrow"), "wb") as f, pa.ipc.new_stream(f, t.schema) as out: out.write_table(t)


def write_webdataset(folder, rows):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder/"train.tar", "w") as tar:
        for i, row in enumerate(rows):
            members = {"png" if k == "image" else f"{k}.png": v for k, v in row.items() if isinstance(v, bytes)}
            members["json"] = json.dumps({k: v for k, v in row.items() if not isinstance(v, bytes)}).encode()
            for ext, data in members.items(): add(tar, f"s{i}.{ext}", data)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


WRITE = dict(jsonl=write_jsonl, parquet=write_parquet, webdataset=write_webdataset, huggingface=write_huggingface)
GOOD = dict(id="good", task="answer", text="What color?", image=png(), answer="red")


# ---- the formats agree ----

def test_every_source_has_a_reader_and_every_reader_a_source():
    assert set(MODULES) == set(SOURCES)


@pytest.fixture(scope="module")
def made():
    "The rows that the fixtures were made from."
    import importlib.util
    spec = importlib.util.spec_from_file_location("make_fixtures", FIXTURES/"make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("source", PLAIN)
def test_every_format_gives_the_rows_it_was_made_from(source, split, made):
    prompts, reading = read(source, FIXTURES/source, split=split)
    pixels = lambda x: np.array(Image.open(io.BytesIO(x)).convert("RGB"))
    assert (reading.rows, reading.skipped) == (5, [])
    for p, row in zip(prompts, made.rows(split), strict=True):
        image, reference = row.get("image"), row.get("reference")
        if row["task"] == "generate": image, reference = None, image                # the picture of a drawing prompt
        if row["task"] == "joint": reference = image
        for name, want in dict(image=image, reference=reference).items():
            got = getattr(p, name)
            assert got is None if want is None else np.array_equal(got, pixels(want)) and got.dtype == np.uint8, (source, p.id, name)
        assert (p.id, p.task, p.text, p.answer) == (row["id"], row["task"], row["text"], row.get("answer"))
        assert (p.question, p.category, p.fact, p.weight) == (row.get("question", ""), row.get("category", ""), row.get("fact"), row.get("weight", 1.0))
        assert (p.choices, p.key_phrases) == (tuple(row.get("choices", ())), tuple(row.get("key_phrases", ())))
        assert [(c.kind, dict(c.params)) for c in p.constraints] == [(c["kind"], c["params"]) for c in row.get("constraints", [])]


def test_the_datasets_library_reads_the_same_from_its_own_folder():
    datasets = pytest.importorskip("datasets")
    theirs = datasets.load_from_disk(str(FIXTURES/"huggingface"))["train"]
    ours, _ = read("huggingface", FIXTURES/"huggingface")
    for p, row in zip(ours, theirs, strict=True):
        picture = p.reference if p.task == "generate" else p.image
        assert p.text == row["text"] and np.array_equal(picture, np.array(row["image"].convert("RGB")))


def test_fixtures_are_small():
    assert sum(f.stat().st_size for f in FIXTURES.rglob("*") if f.is_file()) < 200 * 1024


# ---- the authors' data ----

def test_x2x_rows_are_joint_prompts_or_halves_of_pairs():
    prompts, _ = read("x2x_rft_22k", FIXTURES/"x2x_rft_22k", ("joint",))
    assert len(prompts) == 6 and {p.task for p in prompts} == {"joint"}
    assert [p.answer for p in prompts] == ["2", "B", "2", "A", "2", "C"] and [len(p.choices) for p in prompts] == [0, 3] * 3
    assert prompts[1].text == "a photo of stripes, number 1" and prompts[1].question.startswith("Which color")
    assert np.array_equal(prompts[1].image, prompts[1].reference)
    halves, _ = read("x2x_rft_22k", FIXTURES/"x2x_rft_22k", ("generate", "answer"))
    assert len(halves) == 12 and len({p.id for p in halves}) == 12 and len({p.pair_id for p in halves}) == 6
    rewards, _ = build_rewards([dict(name="accuracy"), dict(name="format")])
    check_prompts(prompts + halves, rewards)                        # every answer can be judged
    texts, images = own_outputs(prompts, None)                      # supervised training learns the whole solution
    assert texts[1] == "<think>I look.</think><answer>B</answer>" and np.array_equal(images[1], prompts[1].reference)


def test_x2x_16k_has_no_questions():
    prompts, _ = read("x2x_rft_16k", FIXTURES/"x2x_rft_16k", ("generate",))
    assert len(prompts) == 4 and all(p.reference.shape == (12, 16, 3) and p.pair_id is None for p in prompts)
    assert "row 1, field 'qa_problem': missing. The row has: prompt, real_image" in why("x2x_rft_16k", FIXTURES/"x2x_rft_16k", ("joint",))


def test_mcot():
    mcq, _ = read("mcot_r1_mcq", FIXTURES/"mcot_r1_mcq", ("answer",))
    vqa, _ = read("mcot_r1_vqa", FIXTURES/"mcot_r1_vqa", ("answer",))
    assert [(p.answer, p.choices) for p in mcq[:2]] == [("A", ("red", "green", "blue")), ("B", ("red", "green", "blue"))]
    assert [(p.answer, p.choices) for p in vqa] == [("2", ())] * 4
    assert "a multiple-choice question without options" in why("mcot_r1_mcq", FIXTURES/"mcot_r1_vqa")
    with pytest.raises(UserError, match="no prompts for the task 'generate'"):
        PromptStream(read("mcot_r1_vqa", FIXTURES/"mcot_r1_vqa", ("generate",))[0], dict(generate=1.0))


SOLUTIONS = {"<answer>D</answer>": "'D' is none of the 3 choices", "<answer>purple</answer>": "'purple' is none of the 3 choices",
             "<answer></answer>": "the answer is empty", "<answer>A</answer><answer>B</answer>": "2 answers", "": "empty",
             "<answer>A": "no <answer>", "?": "none of the 3 choices"}

@pytest.mark.parametrize("solution", SOLUTIONS)
def test_an_answer_key_that_never_parses(solution, made, tmp_path):
    rows = made.mcot(3, choice=True)
    rows[1]["solution"] = solution
    write_parquet(tmp_path, rows)
    message = why("mcot_r1_mcq", tmp_path)
    assert message.startswith("train.parquet, row 2, field 'solution': ") and SOLUTIONS[solution] in message
    prompts, reading = read("mcot_r1_mcq", tmp_path, on_bad_row="skip")
    assert (len(prompts), reading.rows, len(reading.skipped)) == (2, 3, 1)


OPTIONS = {
    "Q?\n A. a cat \n\tB. two dogs\nThink.": ("a cat", "two dogs"), "Q? (A) x (B) y (C) z": ("x", "y", "z"), "Q?\nA) 1.5\nB) -2": ("1.5", "-2"),
    "A: yes\nB: no": ("yes", "no"), "Is A. Smith here?\nA. yes\nB. no": ("yes", "no"), "A. only one": (), "": (), "Options: A. B. C.": (),
    "U.S.A. or U.K.? A. first B. second": ("first", "second"), "A. x C. y": (), "Q?\nA. x\nB. ": (), "B. x A. y": ()}

@pytest.mark.parametrize("text", OPTIONS)
def test_options(text): assert options_in(text) == OPTIONS[text]


# ---- rows that do not fit, in every format ----

def row(**changes): return {k: v for k, v in (GOOD | dict(id="bad") | changes).items() if v is not ...}

BAD = {     # what -> (row, field, words)
    "no text": (row(text=...), "text", "missing. The row has"),
    "no answer": (row(answer=...), "answer", "missing"),
    "empty text": (row(text="  "), "text", "the text is empty"),
    "unknown task": (row(task="anser"), "task", "Did you mean 'answer'"),
    "an edit without a picture": (row(task="edit", image=...), "image", "missing"),
    "joint without a question": (row(task="joint"), "question", "missing"),
    "answer that is no choice": (row(choices=["blue", "green"]), "answer", "'red' is none of the 2 choices"),
    "a letter beyond the choices": (row(choices=["blue", "green"], answer="C"), "answer", "'C' is none of the 2 choices"),
    "duplicate id": (row(id="good"), "id", "'good' is also the id of"),
    "weight 0": (row(weight=0.0), "weight", "expected a number above 0"),
    "half a character": (row(text="\ud800"), "text", "surrogate"),
    "very long text": (row(text="x" * 100_001), "text", "100001 characters"),
    "truncated picture": (row(image=png((64, 64), kind="jpeg")[:300]), "image", "a damaged picture, or one cut short"),
    "truncated png": (row(image=png((640, 64), kind="png", color=(1, 2, 3))[:120]), "image", "a damaged picture, or one cut short"),
    "not a picture": (row(image=b"<html>not found</html>"), "image", "not a picture"),
    "an empty picture": (row(image=b""), "image", "not a picture"),
    "postscript": (row(image=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "image", "not a picture"),
    "too many pixels": (row(image=png((4200, 4200), 0, "L")), "image", "4200x4200 pixels are more than data.max_pixels"),
    "a bomb": (row(image=png((20000, 20000), 0, "1")), "image", "too large"),
    "float pixels": (row(image=png((4, 4), 0.5, "F", "tiff")), "image", "no fixed range"),
}

@pytest.mark.parametrize("source", PLAIN)
@pytest.mark.parametrize("what", BAD)
def test_a_row_that_does_not_fit_is_named_or_counted(what, source, tmp_path):
    bad, field, words = BAD[what]
    if what == "half a character" and source in ("parquet", "huggingface"): pytest.skip("a table cannot hold it")
    WRITE[source](tmp_path/"d", [GOOD, bad, GOOD | dict(id="last")])
    message = why(source, tmp_path/"d")
    assert f", row 2, field {field!r}: " in message and words in message and "data.on_bad_row=skip" in message
    prompts, reading = read(source, tmp_path/"d", on_bad_row="skip")
    assert [p.id for p in prompts] == ["good", "last"] and reading.rows == 3
    [said] = reading.skipped
    assert f", row 2, field {field!r}: " in said and words in said


TYPES = {"text": 3, "id": [1], "task": 4, "image": 7, "answer": ["red"], "choices": "A, B", "constraints": [{"n": 1}], "weight": "heavy", "fact": {"a": 1},
         "key_phrases": [1, 2], "category": 2.5, "pair_id": True}

@pytest.mark.parametrize("source", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", TYPES)
def test_a_wrong_type_is_an_error_and_never_bent(field, source, tmp_path):
    WRITE[source](tmp_path/"d", [GOOD | {field: TYPES[field]}])
    message = why(source, tmp_path/"d")
    assert f"row 1, field {field!r}: " in message and ("expected" in message or "unknown task" in message)
    assert set(TYPES) < set(FIELDS)


@pytest.mark.parametrize("line, words", [
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 14)"), ('{"text": "x"}'.encode("utf-16"), "not UTF-8 (byte 1)"), (b'{"text": "x"', "not JSON"),
    (b'["x"]', "a JSON list, not an object"), (b"null", "a JSON NoneType"), (b"[" * 100_000, "not JSON"), (b"\x00\x00", "not JSON")])
def test_a_line_that_is_no_row(line, words, tmp_path):
    write_jsonl(tmp_path, [GOOD, line])
    assert why("jsonl", tmp_path).startswith("train.jsonl, row 2: ") and words in why("jsonl", tmp_path)


def test_lines_may_begin_with_a_mark_be_blank_or_far_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("unify_rl.data.readers.MAX_LINE", 1000)
    (tmp_path/"a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "' + b"x" * 5000 + b'"}\n{"text": "two"}')
    prompts, reading = read("jsonl", tmp_path, on_bad_row="skip")
    assert [p.text for p in prompts] == ["one", "two"] and reading.skipped == ["a.jsonl, row 4: longer than 1000 bytes"]
    assert [p.id for p in prompts] == ["a.jsonl/1", "a.jsonl/5"]


def test_a_table_with_text_that_is_not_utf8(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    for kind, source in (("parquet", "parquet"), ("arrow", "huggingface")):
        t = pa.table({"text": bad})
        if kind == "parquet": pq.write_table(t, tmp_path/"train.parquet")
        else:
            with pa.OSFile(str(tmp_path/"train.arrow"), "wb") as f, pa.ipc.new_file(f, t.schema) as out: out.write_table(t)     # a file, not a stream
        prompts, reading = read(source, tmp_path, on_bad_row="skip")
        assert [p.text for p in prompts] == ["fine"] and "row 2, field 'text': cannot be read: 'utf-8' codec" in reading.skipped[0]


def test_members_of_a_tar(tmp_path):
    with tarfile.open(tmp_path/"train.tar", "w") as tar:
        add(tar, "a.jpg", png(kind="jpeg")); add(tar, "a.txt", b"a caption"); add(tar, "a.pyd", b"cos\nsystem\n")          # a pickle, never opened
        add(tar, "b.txt", b"caf\xe9")
        add(tar, "c.png", png()); add(tar, "c.jpg", png(kind="jpeg")); add(tar, "c.txt", b"two pictures")
        add(tar, "../../up/d.txt", b"never written anywhere")
        link = tarfile.TarInfo("e.png"); link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"; tar.addfile(link)
        add(tar, "e.txt", b"a link is no picture")
        add(tar, "f.json", b"{"); add(tar, "a.txt", b"again")
    prompts, reading = read("webdataset", tmp_path, on_bad_row="skip")
    assert [(p.id, p.text, p.reference is None) for p in prompts] == [
        ("a", "a caption", False), ("../../up/d", "never written anywhere", True), ("e", "a link is no picture", True)]
    assert [s.split(": ", 1)[1][:22] for s in reading.skipped] == ["not UTF-8 (byte 4)", "given twice", "not JSON: Expecting pr", "'a' is also the id of "]


def test_paths_of_pictures_are_confined(tmp_path):
    (tmp_path/"secret.png").write_bytes(png())
    d = tmp_path/"d"
    (d/"sub").mkdir(parents=True)
    (d/"sub"/"ok.png").write_bytes(png())
    (d/"out.png").symlink_to(tmp_path/"secret.png")
    (d/"in.png").symlink_to(d/"sub"/"ok.png")
    (d/"folder").symlink_to(tmp_path)
    (d/"loop").symlink_to(d/"loop")
    os.mkfifo(d/"pipe.png")
    names = ["../secret.png", str(tmp_path/"secret.png"), "sub/../../secret.png", "..\\secret.png", "C:\\secret.png", "\\\\host\\share\\x.png", "out.png",
             "folder/secret.png", "loop", "sub", "pipe.png", "none.png", "https://example.com/x.png", "file:///etc/passwd", "x\0.png", "x" * 5000, "~/secret.png"]
    for source in ("jsonl", "parquet", "huggingface", "webdataset"):
        for f in d.glob("train.*"): f.unlink()
        WRITE[source](d, [dict(id=f"{i}", text="t", image=name) for i, name in enumerate([*names, "in.png", "sub/ok.png"])])
        prompts, reading = read(source, d, on_bad_row="skip")
        assert [p.id for p in prompts] == [str(len(names)), str(len(names) + 1)] and len(reading.skipped) == len(names), source
        assert all("field 'image'" in s for s in reading.skipped)
        assert "out of the folder" in reading.skipped[0]
        for f in d.glob("data-*"): f.unlink()


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path/"huge.png", "wb") as f:
        f.write(png())
        f.truncate(2**32)                                           # 4 GB, of which almost nothing is on disk
    write_jsonl(tmp_path, [dict(text="t", image="huge.png")])
    assert "too large: 4294967296 bytes" in why("jsonl", tmp_path)


def test_max_pixels_is_a_setting(tmp_path):
    write_jsonl(tmp_path, [dict(text="t", image=png((20, 10)))])
    assert len(read("jsonl", tmp_path, max_pixels=200)[0]) == 1
    assert "20x10 pixels are more than data.max_pixels=199" in why("jsonl", tmp_path, max_pixels=199)


# ---- pictures ----

def test_every_mode_becomes_rgb():
    for mode, color, kind in [("L", 77, "png"), ("1", 1, "png"), ("P", 5, "gif"), ("CMYK", (0, 0, 0, 0), "jpeg"), ("YCbCr", (128, 128, 128), "jpeg"),
                              ("RGBA", (1, 2, 3, 0), "png"), ("LA", (9, 0), "png"), ("I;16", 1000, "png"), ("RGB", (1, 2, 3), "bmp"), ("RGBA", (1, 2, 3, 255), "webp")]:
        x = decode(png((5, 4), color, mode, kind))
        assert x.shape == (4, 5, 3) and x.dtype == np.uint8 and x.flags.writeable, mode
    assert decode(png((1, 1), (1, 2, 3, 0), "RGBA"))[0, 0].tolist() == [255] * 3            # nothing is white
    assert decode(png((1, 1), (9, 0), "LA"))[0, 0].tolist() == [255] * 3
    assert decode(png((1, 1), 0x1234, "I;16"))[0, 0].tolist() == [0x12] * 3
    assert decode(png((1, 1), 77, "L"))[0, 0].tolist() == [77] * 3


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(out := io.BytesIO(), "gif", save_all=True, append_images=frames[1:])
    assert decode(out.getvalue())[0, 0].tolist() == [255, 0, 0]


def test_pictures_stay_encoded_and_errors_later_name_the_row(tmp_path):
    write_jsonl(tmp_path, [dict(id=f"{i}", text="t", image=png((8 + i, 8))) for i in range(3)])
    prompts, _ = read("jsonl", tmp_path)
    assert all(isinstance(p, FilePrompt) and isinstance(vars(p)["reference"], Picture) for p in prompts)
    assert [p.reference.shape for p in prompts] == [(8, 8, 3), (8, 9, 3), (8, 10, 3)] and prompts[0].reference is prompts[0].reference
    prompts, _ = read("jsonl", tmp_path)
    (tmp_path/"1-image.png").write_bytes(b"gone")
    with pytest.raises(UserError, match="train.jsonl, row 2.*not a picture.*has the file been changed"): prompts[1].reference


def test_memory_does_not_grow_with_pixels(tmp_path):
    "200 pictures of 3 MB decoded, in an Arrow file: what is held must be far less than 600 MB."
    import subprocess
    write_huggingface(tmp_path, [dict(id=f"{i}", text="t", image=png((1000, 1000), (i, 0, 0), "RGB", "jpeg")) for i in range(200)])
    probe = (f"import resource; from unify_rl.data.stream import load_prompts; import unify_rl.data.readers, pyarrow, PIL.Image\n"
             f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
             f"prompts = load_prompts('huggingface', 'train', ('generate',), {str(tmp_path)!r})\n"
             f"total = sum(p.reference[0, 0, 0] >= 0 for p in prompts)\n"
             f"print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300)
    n, grown = done.stdout.split()
    assert n == "200" and float(grown) < 300, done.stderr           # 64 decoded pictures are 192 MB


# ---- files and folders ----

def test_which_files_belong_to_a_split(tmp_path):
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet", "cache-12.arrow", ".hidden/train.parquet", "notes.txt"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    names = lambda split: [f.name for f in files_of(str(tmp_path), split, ALL)[1]]
    assert names("train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"] and names("test") == ["test-00000-of-00001.parquet"]
    with pytest.raises(UserError, match="no files of 'tset'. Did you mean 'test'"): names("tset")
    (tmp_path/"plain").mkdir(); (tmp_path/"plain"/"a.jsonl").touch()
    assert [f.name for f in files_of(str(tmp_path/"plain"), "train", ALL)[1]] == ["a.jsonl"]
    with pytest.raises(UserError, match="no files of 'test'"): files_of(str(tmp_path/"plain"), "test", ALL)
    assert [f.name for f in files_of(str(tmp_path/"plain"/"a.jsonl"), "test", ALL)[1]] == ["a.jsonl"]           # a file is a file


def test_a_place_without_data(tmp_path):
    assert "data.path is not given" in why("jsonl", "")
    assert "there is no file or folder" in why("jsonl", tmp_path/"none")
    assert "no file of" in why("jsonl", tmp_path)
    (tmp_path/"x.csv").touch()
    assert "is none of .jsonl" in why("jsonl", tmp_path/"x.csv")
    assert "Did you mean 'jsonl'" in why("json", tmp_path)
    write_jsonl(tmp_path, [GOOD])
    assert "data.columns.caption: unknown field" in why("jsonl", tmp_path, columns={"caption": "text"})
    write_jsonl(tmp_path, [dict(text=1), dict(text=2)])
    assert "none of the 2 rows" in why("jsonl", tmp_path, on_bad_row="skip")


@pytest.mark.parametrize("source, name", [("parquet", "train.parquet"), ("huggingface", "data-00000-of-00001.arrow"), ("webdataset", "train.tar")])
def test_a_damaged_file_is_an_error_even_when_rows_may_be_skipped(source, name, tmp_path):
    WRITE[source](tmp_path, [GOOD | dict(id=f"{i}", image=png((60, 60), (i, 0, 0))) for i in range(20)])
    whole = (tmp_path/name).read_bytes()
    for part in (b"", whole[:7], whole[:len(whole) // 2], b"\0\xff" * 700):
        (tmp_path/name).write_bytes(part)
        assert "damaged or cut short" in why(source, tmp_path, on_bad_row="skip"), len(part)


def test_columns_may_have_other_names(tmp_path):
    write_parquet(tmp_path, [dict(caption="a cat", jpg=png()), dict(caption=None, jpg=png())])
    prompts, reading = read("parquet", tmp_path, on_bad_row="skip", columns={"text": "caption", "image": "jpg"})
    assert prompts[0].text == "a cat" and prompts[0].reference.shape == (6, 8, 3) and "field 'caption': missing" in reading.skipped[0]


def test_rows_of_tasks_nobody_asked_for_are_no_bad_rows(tmp_path):
    write_jsonl(tmp_path, [GOOD, dict(task="generate", text="t", image="none.png")])
    prompts, reading = read("jsonl", tmp_path, ("answer",))
    assert len(prompts) == 1 and reading.rows == 2 and not reading.skipped


# ---- in a run ----

def test_a_run_reads_files_counts_what_it_skips_and_says_so(tmp_path, capfd):
    from unify_rl.cli import main
    from unify_rl.policies.janus import new_janus
    from unify_rl.train.pretrain import vocabulary
    from unify_rl.train.runlog import read_summary
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(tmp_path/"tiny")
    write_jsonl(tmp_path/"d", [dict(id="1", text="is there a circle?", image=png(), answer="yes"), dict(id="2", text="how many?", image=png()[:40], answer="2")])
    words = ["train", "grpo", "--policy", str(tmp_path/"tiny"), "data.source=jsonl", f"data.path={tmp_path/'d'}", "data.tasks={answer: 1}", "rewards=[{name: accuracy}]",
             "rollout.prompts=1", "rollout.group_size=2", "rollout.max_text=4", "steps=1", "evaluate.suites=[]", f"run_dir={tmp_path/'run'}"]
    assert main(words) == 2
    assert "train.jsonl, row 2, field 'image'" in capfd.readouterr().err and not (tmp_path/"run").exists()
    assert main([*words, "data.on_bad_row=skip"]) == 0
    assert "1 of 2 rows of the data do not fit" in capfd.readouterr().out
    assert read_summary(tmp_path/"run")["data"] == {"prompts": {"answer": 1}, "rows": 2, "skipped": 1}
    assert "row 2, field 'image'" in json.loads((tmp_path/"run"/"data.json").read_text())["why"][0]
