"""Run every command that README.md and docs/*.md print, as a shell would, on small data; follow their links."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from imagesets.phantoms.make import write_phantoms
from imagesets.reader import ImageSet
from tests.helpers.generator_files import save_generator, save_lesion_generator
from tests.helpers.make_archives import encode, make_folder, make_zip

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Commands that are not run here, each with the reason. Whatever else a document prints is run.
NOT_RUN = {
    "make setup": "made the environment that these tests run in",
    "make demo": "tests/end_to_end/test_demo.py runs it, shortened",
    "make test": "runs these tests",
    "make lint": ".ci/run runs it",
    "python -m venv .venv": "as make setup",
    'pip install -e ".[dev]"': "as make setup",
    'pip install -e ".[federated]"': "as make setup",
    "scripts/gpu_acceptance.sh": "builds the CUDA operators and takes many minutes",
    "python -m torch_utils.ops.build --kind=cuda":
        "compiles for minutes; tests/torch_utils/ops/test_cuda_library.py does it",
    "python calc_metrics.py --compare ham128-b.zip nevi.zip --data=ham128-a.zip --detector=efficientnet-lite0 "
    "--metrics=fid250,fid500,fid1k,fid2k,kid250,kid500,kid1k,kid2k,pr250,pr500,pr1k,pr2k,dc250,dc500,dc1k,dc2k":
        "needs thousands of images; a shorter comparison is run",
    "python -m pytest -m slow -s tests/metrics/test_interval_coverage.py "
    "tests/metrics/test_interval_coverage_kernel.py tests/metrics/test_interval_coverage_frechet.py":
        "runs slow tests, which `make slow` runs",
    "python tests/end_to_end/check_parity.py FOLDER":
        "tests/end_to_end/test_parity.py runs the same checks on tests/data",
    **dict.fromkeys([
        "python federate.py server --kit=kits/server --outdir=runs",
        "python federate.py site --kit=kits/a --data=a.zip",
        "python federate.py start --kit=kits/admin --name=lesions --rounds=100 --cond=1 --mirror=1",
        "python federate.py status --kit=kits/admin",
        "python federate.py status --kit=kits/admin --name=lesions",
        "python federate.py logs --kit=kits/admin --name=lesions --tail=20 --follow",
        "python federate.py stop --kit=kits/admin --name=lesions",
    ], "needs a server and sites that run at the same time: tests/end_to_end/test_deployment_*.py start them"),
}
# How blocks begin that are printed like commands: JSON, a unit of systemd, formulas.
NO_COMMANDS = ("{", "[", "k = ", "base + ")
# What makes a printed command small. Options keep their places and forms, so that what is checked is what is printed.
SMALLER = [
    (r"--resolution=\d+x\d+", "--resolution=16x16"),
    (r"--seeds=0-63", "--seeds=0-3"),
    (r"--seeds=0-1999", "--seeds=0-139"),  # 20 of each of seven classes
    (r"--num=\d+", "--num=2"),
    (r"--frames=\d+", "--frames=4"),
    (r"--count=(?!200\b)\d{1,3}\b", "--count=24"),
    (r"--count=200\b", "--count=50"),  # as many projections as a map wants in place of real images
    (r"--count=\d{4,}\b", "--count=128"),  # as many as a study wants that adds them to its training images
    (r"([a-z]+):5000\b", r"\1:64"),
    (r"--gpus=\d+", "--gpus=2"),
    (r"--fraction=0\.1\b", "--fraction=0.5"),
    (r"--rounds=\d+", "--rounds=2"),
    (r"--round-kimg=[\d.]+", "--round-kimg=0.008"),
    (r"--kimg=\d+", "--kimg=1"),
    (r"--epochs=\d+", "--epochs=1"),
    (r"--size=\d+", "--size=32"),
    (r"--nproc-per-node=\d+", "--nproc-per-node=2"),
    (r"\b(fid|kid)\d+k", r"\g<1>20"),
    (r"\b(pr|dc)\d+k\d", r"\g<1>20"),
]
# What a command gets in addition, where it does not say it itself.
ADDED = {
    "train.py": ["--cfg=tiny", "--kimg=1", "--batch=8", "--metrics=none", "--workers=1", "--device=cpu"],
    "generate.py": ["--device=cpu"],
    "projector.py": ["--num-steps=3", "--detector=pixels", "--save-video=0", "--device=cpu"],
    "calc_metrics.py": ["--metrics=kid20_full", "--detector=random-conv", "--device=cpu"],
    "dataset_tool.py": [],
    "federate.py simulate": ["--cfg=tiny", "--round-kimg=0.008", "--batch=8", "--workers=1", "--device=cpu"],
    "federate.py compare": ["--cfg=tiny", "--batch=8", "--detector=random-conv", "--device=cpu",
                            "--dry-run"],  # it makes five runs; tests/federated/test_compare_arms.py makes them
    "federate.py provision": [],
    "federate.py revoke": [],
    "cp -r": [],
    "study.py protocol": ["--workers=1"],
    "study.py classify": ["--size=32", "--num-seeds=2", "--resamples=50", "--workers=1", "--device=cpu"],
    "study.py predict": ["--workers=1", "--device=cpu"],
    "study.py authenticity": ["--detector=random-conv", "--count=4", "--num-steps=2", "--draws=2", "--resamples=999",
                              "--workers=1", "--device=cpu"],
    "study.py embed": ["--features=random-conv", "--maps=tsne,pca", "--workers=1", "--device=cpu"],
    "explore.py sefa": ["--steps=2", "--num=2", "--device=cpu"],
    "explore.py boundary": ["--steps=2", "--permutations=60", "--device=cpu"],
    "explore.py edit": ["--steps=2", "--frames=4", "--device=cpu"],
    "explore.py interpolate": ["--frames=4", "--device=cpu"],
    "explore.py neighbors": ["--num=2", "--detector=random-conv", "--device=cpu"],
    "explore.py anatomy": ["--seeds=0-3", "--draws=4", "--psi=0,1", "--device=cpu"],
    "-m training.nvidia_pickle": [],
    "-m torch_utils.ops.build": [],
}


def commands_of(document):
    """Return the commands of the indented blocks of a document, each on one line."""
    text = re.sub(r"^```python\n.*?^```$", "", read(document), flags=re.DOTALL | re.MULTILINE)
    assert "```" not in text, f"{document} has a block that is neither indented nor Python; expected commands indented"
    blocks = re.findall(r"(?<=\n\n)(?:    .*\n+)+", text)
    lines = [line for block in blocks if not block.strip().startswith(NO_COMMANDS)
             for line in re.sub(r"\\\n", " ", block).splitlines() if line.strip()]
    return [" ".join(line.split(" #")[0].split()).replace(".venv/bin/", "") for line in lines]


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def program_of(command):
    """Return the key of ADDED that a command runs."""
    return next((name for name in ADDED if f" {name} " in f" {command} "), None)


def shortened(command):
    """Return the command for small data."""
    for pattern, text in SMALLER:
        command = re.sub(pattern, text, command)
    given = {word.split("=")[0] for word in shlex.split(command)}
    added = [option for option in ADDED[program_of(command)] if option.split("=")[0] not in given]
    return " ".join([command, *added])


def make_ham10000(folder, melanomas):
    """Make an archive with the names, columns and classes of HAM10000: two images a lesion.

    melanomas:  number of lesions in addition to five of each class
    """
    names = "akiec bcc bkl df mel nv vasc".split()
    classes = [*(names * 5), *["mel"] * melanomas]
    rows = [{"lesion_id": f"HAM_{index // 2:07d}", "image_id": f"ISIC_{index:07d}", "dx": classes[index // 2],
             "dx_type": "histo", "age": "50", "sex": "male", "localization": "back"}
            for index in range(2 * len(classes))]
    for part in (1, 2):
        of_part = rows[len(classes) * (part - 1):len(classes) * part]
        make_folder(folder / f"HAM10000_images_part_{part}", jpegs(row["image_id"] for row in of_part))
    make_folder(folder / "HAM10000_images", jpegs(row["image_id"] for row in rows))
    write_table(folder / "HAM10000_metadata.csv", rows)


def make_isic2020(folder):
    """Make an archive with the names and columns of ISIC 2020, unbalanced."""
    rows = [{"image_name": f"ISIC_{index + 500:07d}", "patient_id": f"IP_{index // 2:07d}",
             "benign_malignant": "malignant" if index % 10 < 2 else "benign", "target": int(index % 10 < 2)}
            for index in range(60)]
    names = [row["image_name"] for row in rows]
    make_zip(folder / "ISIC_2020_Training_JPEG.zip", {f"train/{name}": data for name, data in jpegs(names).items()})
    make_folder(folder / "ISIC_2020_JPEG", jpegs(names))
    write_table(folder / "ISIC_2020_Training_GroundTruth_v2.csv", rows)


def make_isic2019(folder):
    """Make archives with the names and columns of ISIC 2019 and of a download from the ISIC archive."""
    names = [f"ISIC_{index + 900:07d}" for index in range(24)]
    kinds = "MEL NV BCC AK BKL DF VASC SCC UNK".split()
    make_folder(folder / "ISIC_2019_Training_Input", jpegs(names))
    write_table(folder / "ISIC_2019_Training_GroundTruth.csv", [
        {"image": name} | {kind: float(place == index % 8) for place, kind in enumerate(kinds)}
        for index, name in enumerate(names)])
    write_table(folder / "ISIC_2019_Training_Metadata.csv", [
        {"image": name, "age_approx": "50.0", "anatom_site_general": "",
         "lesion_id": f"BCN_{index // 2:07d}", "sex": ""}
        for index, name in enumerate(names)])
    make_folder(folder / "ISIC-images", jpegs(names))
    write_table(folder / "metadata.csv", [
        {"isic_id": name, "diagnosis_1": "Benign", "diagnosis_2": "", "lesion_id": "", "patient_id": f"IP_{index:07d}",
         "diagnosis_3": ("Nevus", "Melanoma, NOS", "")[index % 3]} for index, name in enumerate(names)])


def jpegs(names):
    """Return {file name: bytes}, each image another."""
    return {f"{name}.jpg": encode(np.random.RandomState(int(name[5:])).randint(0, 256, (24, 32, 3)), "jpeg")
            for name in names}


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_phantoms(path, seed, count=60):
    write_phantoms(path, workers=1, count=count, resolution=16, classes={"benign": 0.6, "melanoma": 0.4}, seed=seed,
                   bias={})


def make_workplace(folder):
    """Make a folder in which the printed commands find the programs and all files that they name."""
    for name in ("train.py", "generate.py", "projector.py", "calc_metrics.py", "dataset_tool.py", "federate.py",
                 "explore.py", "study.py", "training", "torch_utils", "metrics", "dnnlib", "imagesets", "latent",
                 "federated", "generation", "analysis"):
        (folder / name).symlink_to(ROOT / name)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (folder / "bin" / "torchrun").write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m torch.distributed.run --standalone "$@"\n')
    (folder / "bin" / "torchrun").chmod(0o755)


def make_explored(folder):
    """Make a network whose lesions can be measured, images of its classes, and a table of its seeds."""
    classes = "akiec bcc bkl df mel nv vasc".split()
    save_lesion_generator(folder / "N.safetensors", {"classes": classes}, c_dim=len(classes))
    for name in ("train.zip", "heldout.zip"):
        write_phantoms(folder / name, workers=1, count=60, resolution=16, classes={"mel": 0.5, "nv": 0.5}, seed=1,
                       bias={})
    write_table(folder / "table.csv", [{"seed": seed, "age": 20 + seed * 7 % 60} for seed in range(140)])
    make_folder(folder, {"lesion.jpg": jpegs(["ISIC_0000009"])["ISIC_0000009.jpg"]})


def make_mapped(folder):
    """Make a network of two classes, images of these classes, and attributes of their lesions."""
    for name in ("ham256.zip", "ham256-train.zip"):
        write_phantoms(folder / name, workers=1, count=120, resolution=16, classes={"mel": 0.4, "nv": 0.6}, seed=0,
                       bias={})
    (folder / "runs" / "00000-ham256").mkdir(parents=True)
    save_generator(folder / "runs" / "00000-ham256" / "network-snapshot-000200.safetensors",
                   {"classes": ["mel", "nv"], "class_counts": [48, 72]}, img_resolution=16)
    lesions = sorted(set(ImageSet(folder / "ham256-train.zip").named_groups()))
    write_table(folder / "HAM10000_metadata.csv", [
        {"lesion_id": lesion, "image_id": f"ISIC_{index:07d}", "age": 20 + index, "localization": "back"}
        for index, lesion in enumerate(lesions)])


def make_files(folder, document):
    """Make what the commands of a document take for granted."""
    if document in ("README.md", "docs/data.md"):
        make_ham10000(folder, 40 if document == "README.md" else 0)  # a study needs several melanomas in each part
        make_isic2020(folder)
        make_isic2019(folder)
    if document == "docs/federated.md":  # it is divided twice, with both classes in each part
        make_phantoms(folder / "isic256.zip", seed=0, count=300)
    if document == "docs/hospitals.md":
        make_phantoms(folder / "a.zip", seed=0)
        (folder / "requests").symlink_to("kit-a")  # where the site's request is made
    if document == "docs/study.md":  # with several lesions of both classes in each part
        make_phantoms(folder / "isic256.zip", seed=0, count=150)
        make_phantoms(folder / "heldout.zip", seed=1, count=12)
    if document == "docs/authenticity.md":  # with more than 20 lesions in the held-out parts
        write_phantoms(folder / "ham256.zip", workers=1, count=200, resolution=16, classes={"mel": 0.4, "nv": 0.6},
                       seed=0, bias={})
        save_generator(folder / "other-network.safetensors", img_resolution=16, c_dim=0)
    if document == "docs/embedding.md":
        make_mapped(folder)
    if document == "docs/explore.md":
        make_explored(folder)
    if document in ("README.md", "docs/authenticity.md", "docs/embedding.md", "docs/explore.md", "docs/federated.md",
                    "docs/hospitals.md", "docs/study.md"):
        return
    (folder / "network-snapshot.pkl").symlink_to(ROOT / "tests" / "data" / "sample_32_c2.stripped.pkl")
    classes = {"classes": ["benign", "melanoma"], "class_counts": [24, 36]}
    for name in ("N.safetensors", "network-snapshot-001000.safetensors",
                 "runs/00007-isic256/network-snapshot-000200.safetensors",
                 "runs/00008-isic256/network-snapshot-000200.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_generator(folder / name, classes, img_resolution=16)
    names = ["isic256.zip", "heldout.zip", *(["synthetic.zip"] if document == "docs/metrics.md" else [])]
    for seed, name in enumerate(names):
        make_phantoms(folder / name, seed)
    if document == "docs/metrics.md":
        write_phantoms(folder / "ham128.zip", workers=1, count=60, resolution=16, classes={"mel": 0.4, "nv": 0.6},
                       seed=1, bias={})
    make_folder(folder / "photos", jpegs(f"ISIC_{index:07d}" for index in range(3)))
    make_folder(folder, {"lesion.jpg": jpegs(["ISIC_0000009"])["ISIC_0000009.jpg"]})


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_command_of_a_document_does_what_it_says_as_printed(document, tmp_path):
    commands = commands_of(document)
    make_workplace(tmp_path)
    make_files(tmp_path, document)
    variables = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                 "PYTHONWARNINGS": "ignore", "DNNLIB_CACHE_DIR": str(tmp_path / "cache")}
    for command in commands:
        if command in NOT_RUN:
            continue
        assert program_of(command), f"{document}: {command!r} names no program that this test knows; add it to ADDED"
        done = subprocess.run(["bash", "-c", shortened(command)], cwd=tmp_path, env=variables, check=False,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{document}: {shortened(command)}\n{done.stderr}"
    if document == "README.md":  # from the archive to the end, with its labels
        synthetic = ImageSet(tmp_path / "isic-synthetic.zip")
        assert synthetic.classes == ["benign", "malignant"]
        assert np.bincount(synthetic.labels).tolist() == [64, 64]
    if document in ("README.md", "docs/study.md"):  # of the network that the page trains
        results = json.loads((tmp_path / "classifiers" / "results.json").read_text(encoding="utf-8"))
        assert results["verified"] is True
        assert {entry["condition"] for entry in results["results"]} == {"real", "synthetic", "real+synthetic-1"}
    if document == "docs/authenticity.md":
        check_authenticity(tmp_path)
    if document == "README.md":
        check_map(tmp_path / "map.html", ["real", "synthetic", "projected"])
    if document == "docs/embedding.md":  # its last map, and that of styles
        check_map(tmp_path / "map.html", ["real", "synthetic"])
        check_map(tmp_path / "styles.html", ["real", "synthetic"])
    if document == "docs/python.md":
        check_python_blocks(document, tmp_path, variables)


def check_authenticity(folder):
    """Check that all tests ran for the network that the page trains, and that its pipeline stores no real image."""
    results = json.loads((folder / "authenticity" / "results.json").read_text(encoding="utf-8"))
    assert results["verified"] is True
    assert {test["number"] for test in results["tests"] if test["ran"]} == {1, 2, 3}
    assert "<img" in (folder / "authenticity" / "page.html").read_text(encoding="utf-8")


def check_map(path, kinds):
    """Check of which kinds the sets of a map are, and that its script and its numbers have all maps."""
    page = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert [one["kind"] for one in data["sets"]] == kinds
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [one["key"] for one in data["maps"]] == [one["key"] for one in record["maps"]] == ["tsne", "pca"]


def check_python_blocks(document, folder, variables):
    """Run a document's Python, on the network that its command converted and on images drawn at random."""
    blocks = re.findall(r"^```python\n(.*?)^```$", read(document), flags=re.DOTALL | re.MULTILINE)
    drawn = "reals, labels = torch.rand(16, 3, 32, 32) * 2 - 1, torch.eye(2).repeat(8, 1)\n"
    blocks[1] = "import torch\n" + re.sub(r"^reals, labels = \.\.\..*\n", drawn, blocks[1], flags=re.MULTILINE)
    checks = ["assert img.shape == (4, 3, 32, 32) and img.abs().mean() > 0\n",
              "assert state.nimg == 16 and result.skipped == {}\n"]
    for block, check in zip(blocks, checks, strict=True):
        done = subprocess.run(["python", "-c", block + check], cwd=folder, env=variables, check=False,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_commands_that_are_not_run_are_still_printed_and_possible():
    printed = {command for document in DOCUMENTS for command in commands_of(document)}
    assert set(NOT_RUN) <= printed
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in NOT_RUN:
        program = shlex.split(command)
        if program[0] == "make":
            assert program[1] in targets
        elif program[0] == "pip":
            extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
            assert re.fullmatch(r"\.\[(.*)\]", program[-1])[1] in extras
        elif "-m" not in program:
            assert (ROOT / program[program[0] == "python"]).is_file()


def anchors_of(document):
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(document), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_to_files_and_headings(document):
    text = re.sub(r"^```python\n.*?^```$", "", read(document), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        if path.startswith("https://"):
            continue
        target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors_of(target.relative_to(ROOT))):
            broken.append("".join(link))
    assert broken == []


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[a-z]+\.md)", read("README.md")))
    assert linked == set(DOCUMENTS[1:])
