"""imagesets.split and deal: groups stay whole, and parts are alike; the command `split`."""

import zipfile
from collections import defaultdict

import numpy as np
import pytest

from dnnlib.cli import UserError, run
from imagesets.classes import NO_LABEL
from imagesets.commands import describe_split, split_command
from imagesets.deal import deal
from imagesets.reader import ImageSet
from imagesets.split import LEFT_OUT, assign
from tests.helpers.make_sets import enclose, make_set
from tests.helpers.split_cases import THREE, Labels, make_request, unique_digests


def random_labels(seed):
    """Return random labels and groups: pure or mixed groups, of equal or very different sizes."""
    random = np.random.RandomState(seed)
    num_classes = random.randint(1, 6)
    frequency = random.dirichlet(np.ones(num_classes))
    labels, groups = [], []
    for group in range(random.randint(40, 200)):
        main, purity = random.choice(num_classes, p=frequency), random.choice([1, 0.7])
        for _ in range(random.geometric([0.9, 0.5, 0.15][seed % 3])):
            labels.append(main if random.rand() < purity else random.randint(num_classes))
            groups.append(f"patient{group}")
    order = random.permutation(len(labels))
    return Labels(np.array(labels)[order], [groups[index] for index in order])


@pytest.mark.parametrize("seed", range(24))
def test_assign_random_structures_keeps_groups_whole_and_parts_alike(seed):
    images = random_labels(seed)
    digests = unique_digests(len(images), seed)
    linked = np.random.RandomState(seed).choice(len(images), 3, replace=False)
    digests[linked] = digests[linked[0]]
    shares = [(0.8, 0.1, 0.1), (0.5, 0.5), (0.6, 0.2, 0.1, 0.1)][seed % 3]
    parts = ",".join(f"p{index}:{share}" for index, share in enumerate(shares))
    asked = make_request(parts, seed=seed, allow_missing=True)
    result = assign(images, digests, asked)

    assert result.part_of.shape == (len(images),)
    assert set(result.part_of) == set(range(len(asked.parts)))
    parts_of_group = defaultdict(set)
    for group, part in zip(images.groups, result.part_of, strict=True):
        parts_of_group[group].add(part)
    assert all(len(parts) == 1 for parts in parts_of_group.values())
    assert len(set(result.part_of[linked])) == 1
    largest = np.bincount(result.unit_of).max()
    for part, share in enumerate(shares):
        inside = result.part_of == part
        assert abs(inside.sum() - share * len(images)) <= largest
        for label in np.unique(images.labels):
            # As close as whole groups allow: a class is off by less than one of the largest groups.
            of_class = images.labels == label
            assert abs((inside & of_class).sum() - share * of_class.sum()) <= largest
            units = set(result.unit_of[of_class])
            assert (inside & of_class).any() or len(units) < len(shares)


def test_assign_single_images_reaches_shares_to_one_image():
    images = Labels(np.repeat([0, 1, 2], [700, 200, 100]))
    result = assign(images, unique_digests(1000), make_request(THREE))
    assert result.reached[:3].tolist() == [[800, 800, 560, 160, 80], [100, 100, 70, 20, 10], [100, 100, 70, 20, 10]]


def test_assign_deals_each_size_of_group_in_proportion():
    # 40 groups of one image, 40 of three: a test set of single images only would not be like the training set.
    groups = [f"one{index}" for index in range(40)] + [f"three{index}" for index in range(40) for _ in range(3)]
    images = Labels(np.zeros(160, dtype=int), groups)
    result = assign(images, unique_digests(160), make_request("train:0.75,test:0.25"))
    inside = {group for group, part in zip(groups, result.part_of, strict=True) if part == 1}
    assert sorted(group.rstrip("0123456789") for group in inside) == ["one"] * 10 + ["three"] * 10


def test_assign_same_seed_same_result_other_seed_other_result():
    images, digests = random_labels(4), unique_digests(len(random_labels(4)))
    first = assign(images, digests, make_request(THREE, allow_missing=True)).part_of
    assert (first == assign(images, digests, make_request(THREE, allow_missing=True)).part_of).all()
    others = [assign(images, digests, make_request(THREE, seed=seed, allow_missing=True)).part_of for seed in (1, 2, 3)]
    assert all((first != other).mean() > 0.1 for other in others)


def test_assign_order_is_that_of_a_stored_result():
    # Splits are cited for years: the same groups and seed must give the same one on every machine and version.
    images = Labels(np.arange(20) % 2, [f"g{index}" for index in range(20)])
    result = assign(images, unique_digests(20), make_request("train:0.6,test:0.4", seed=7))
    assert "".join(map(str, result.part_of)) == "10010100001000111001"


def test_assign_identical_images_link_groups_in_a_chain():
    images = Labels(np.zeros(8, dtype=int), list("aabbccde"))
    digests = unique_digests(8)
    digests[2], digests[4] = digests[1], digests[3]  # a = b, b = c
    result = assign(images, digests, make_request("x:0.75,y:0.25"))
    assert result.num_linked == 2
    assert result.part_of.tolist() == [0] * 6 + [1, 1]


@pytest.mark.parametrize("skew", [None, "1=0.3,0.1,*"])
def test_assign_institutions_divide_the_first_part_and_leave_the_others(skew):
    images = Labels(np.repeat([0, 1], [500, 100]))
    digests = unique_digests(600)
    plain = assign(images, digests, make_request("train:0.9,test:0.1", seed=3)).part_of
    divided = assign(images, digests, make_request("train:0.9,test:0.1", institutions=3, sizes="0.1,0.3,0.6", skew=skew,
                                              seed=3))
    assert ((divided.part_of == 3) == (plain == 1)).all()
    assert divided.reached[:, 0].tolist() == [54, 162, 324, 60, 0]


def test_assign_skew_gives_the_shares_and_the_rest():
    images = Labels(np.repeat([0, 1, 2], [600, 100, 300]))
    result = assign(images, unique_digests(1000), make_request(institutions=3, sizes="0.1,0.3,0.6", skew="1=0.3,0.1,*"))
    # 30 and 30 of class 1, 40 are left; classes 0 and 2 fill up as 600 : 300.
    assert result.reached[:3, 2:].tolist() == [[47, 30, 23], [180, 30, 90], [373, 40, 187]]
    assert (result.part_of != LEFT_OUT).all()


def test_assign_skew_leave_out_keeps_the_shares_of_fewer_images():
    images = Labels(np.repeat([0, 1], [900, 100]))
    result = assign(images, unique_digests(1000), make_request(institutions=2, skew="1=0.6,0.2", leave_out=True))
    assert result.reached[:, 2:].tolist() == [[50, 75], [100, 25], [750, 0]]
    assert (result.part_of == LEFT_OUT).sum() == 750


def test_assign_lists_stratifies_each_number():
    random = np.random.RandomState(0)
    labels = (random.rand(400, 3) < [0.5, 0.1, 0.03]).astype(np.float32)
    result = assign(Labels(labels), unique_digests(400), make_request("train:0.75,test:0.25"))
    assert np.abs(result.reached[1] - 0.25 * result.reached.sum(axis=0)).max() <= 1


def test_assign_lists_does_not_take_a_measure_for_a_class():
    random = np.random.RandomState(0)
    ages = random.randint(20, 90, 100)
    ages[:99] = 0  # one group alone has an age above 0.5: no class that each part must hold
    labels = np.column_stack([random.rand(100) < 0.5, ages]).astype(np.float32)
    result = assign(Labels(labels), unique_digests(100), make_request("train:0.75,test:0.25"))
    assert list(result.classes) == ["0"]
    assert result.reached[:, 0].tolist() == [75, 25, 0]


def test_assign_without_labels_splits_by_size():
    images = Labels(None, [f"g{index // 2}" for index in range(100)])
    result = assign(images, unique_digests(100), make_request(THREE))
    assert result.reached.tolist() == [[80, 40], [10, 5], [10, 5], [0, 0]]


def test_assign_some_without_label_deals_them_like_a_class():
    images = Labels(np.repeat([0, NO_LABEL], [80, 20]))
    result = assign(images, unique_digests(100), make_request("a:0.5,b:0.5"))
    assert result.classes == ("0", "(no label)")
    assert result.reached.tolist() == [[50, 50, 40, 10], [50, 50, 40, 10], [0, 0, 0, 0]]


def test_assign_allow_missing_lets_a_rare_class_be_in_some_parts():
    images = Labels(np.repeat([0, 1], [98, 2]))
    result = assign(images, unique_digests(100), make_request(THREE, allow_missing=True))
    assert result.reached[:3, 0].tolist() == [80, 10, 10]
    assert result.reached[:3, 3].sum() == 2


def test_assign_gives_every_part_a_class_that_has_just_enough_groups():
    images = Labels(np.repeat([0, 1], [997, 3]))
    result = assign(images, unique_digests(1000), make_request(THREE))
    assert result.reached[:3, 3].tolist() == [1, 1, 1]


def test_assign_without_a_way_for_each_class_raises():
    # Three classes, each in two of three groups: in two parts, one class is always missing somewhere.
    images = Labels([0, 1, 1, 2, 2, 0], list("uuvvww"))
    with pytest.raises(UserError, match=r"no way was found to give part [ab] a group of [012] from the data set; "
                                        "request fewer parts or larger shares, or try another --seed"):
        assign(images, unique_digests(6), make_request("a:0.5,b:0.5"))


def test_deal_prefers_a_required_class_to_equal_sizes():
    counts = np.array([[9, 1, 9, 0], [1, 1, 0, 1], [1, 1, 0, 1]])
    targets = np.array([0.5, 0.5])[:, None] * counts.sum(axis=0)
    required = np.array([[False, False, False, True]] * 2)
    assert sorted(deal(counts, targets, required, np.arange(3))[1:]) == [0, 1]


def test_split_command_writes_parts_beside_the_set_and_prints_what_was_reached(tmp_path, capsys):
    groups = [f"g{index // 2}" for index in range(40)]
    path = make_set(tmp_path / "isic.zip", 40, labels=[0] * 30 + [1] * 10, classes=["benign", "melanoma"],
                    groups=groups)
    assert run(split_command, [str(path), "--parts=train:0.8,test:0.2"]) == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "isic-split.json", "isic-test.zip", "isic-train.zip", "isic.zip"]
    assert capsys.readouterr().out.splitlines() == [
        "          all  train         test",
        "target                80.0%        20.0%",
        "images     40     32  80.0%     8  20.0%",
        "groups     20     16  80.0%     4  20.0%",
        "benign     30     24  80.0%     6  20.0%",
        "melanoma   10      8  80.0%     2  20.0%",
        f"written to {tmp_path}: isic-train.zip, isic-test.zip, isic-split.json",
    ]


def test_describe_split_tells_phantoms_links_and_skew():
    images = Labels(np.repeat([0, 1], [30, 10]))
    digests = unique_digests(40)
    digests[1] = digests[0]
    asked = make_request(institutions=2, skew="1=0.5,0.1", leave_out=True)
    lines = list(describe_split(assign(images, digests, asked), asked, is_phantom=True))
    assert lines[:2] == ["PHANTOM: rendered images, not patient data",
                         "1 group joined with others because they share identical images"]
    assert lines[-3:] == ["    institution1   institution2", "0  50.0% (50.0%)  88.2% (90.0%)",
                          "1  50.0% (50.0%)  11.8% (10.0%)"]


def test_split_command_skew_file_means_the_same_as_the_text(tmp_path):
    path = make_set(tmp_path / "set.zip", 40, labels=[0, 1, 2, 2] * 10, classes=["a", "b", "c"])
    (tmp_path / "skew.txt").write_text("# shares of two institutions\na=0.1,*\n\nb = *, 0.1  # few\n")
    for folder, skew in (("one", "a=0.1,*;b=*,0.1"), ("two", str(tmp_path / "skew.txt"))):
        assert run(split_command, [str(path), "--institutions=2", f"--skew={skew}", f"--dest={tmp_path / folder}"]) == 0
    for name in ("set-institution1.zip", "set-split.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


ERRORS = [
    ([], "neither --parts nor --institutions is given; expected --parts=NAME:SHARE,NAME:SHARE,... such as "
         "train:0.8,val:0.1,test:0.1, or --institutions=3"),
    (["--parts=train:0.8,val:0.1"], "--parts=train:0.8,val:0.1: the shares sum to 0.9; expected 1"),
    (["--parts=a:0.5,A:0.5"], "--parts=a:0.5,A:0.5 names A twice; expected each name once"),
    (["--parts=train=0.8"], "--parts=train=0.8: 'train=0.8' is not NAME:SHARE; expected NAME:SHARE,NAME:SHARE,... such "
                            "as train:0.8,val:0.1,test:0.1"),
    (["--parts=a:0.5,"], "--parts=a:0.5,: '' is not NAME:SHARE; expected NAME:SHARE,NAME:SHARE,... such as "
                         "train:0.8,val:0.1,test:0.1"),
    (["--parts=../a:1"], "--parts=../a:1: '../a:1' is not NAME:SHARE; expected NAME:SHARE,NAME:SHARE,... such as "
                         "train:0.8,val:0.1,test:0.1"),
    (["--parts=a:half,b:0.5"], "--parts=a:half,b:0.5: the share 'half' is not a number; expected one such as 0.8 or "
                               "1/3"),
    (["--parts=a:nan,b:0.5"], "--parts=a:nan,b:0.5: the share 'nan' is not a number; expected one such as 0.8 or 1/3"),
    (["--parts=a:1,b:0"], "--parts=a:1,b:0: the share 0 is out of range; expected a number above 0 and up to 1"),
    (["--parts=a:1.5,b:-0.5"], "--parts=a:1.5,b:-0.5: the share 1.5 is out of range; expected a number above 0 and up "
                               "to 1"),
    (["--parts=a:0.25,b:0.25,c:0.25,d:0.25"],
     "the data set has 3 groups (3 images) of class c; expected at least 4, one for each part (a, b, c, d): merge "
     "classes when converting (--merge), request fewer parts, or give --allow-missing"),
    (["--parts=a:0.5,b:0.5", "--sizes=0.5,0.5"],
     "--sizes is given without --institutions; add it, such as --institutions=3"),
    (["--parts=a:0.5,b:0.5", "--skew=a=0.5"],
     "--skew is given without --institutions; add it, such as --institutions=3"),
    (["--institutions=2", "--leave-out"], "--leave-out is given without --skew; expected both or neither"),
    (["--institutions=2", "--sizes=0.5"], "--sizes=0.5 has 1 number; expected 2, one for each of --institutions=2"),
    (["--institutions=2", "--sizes=0.5,0.6"], "--sizes=0.5,0.6: the shares sum to 1.1; expected 1"),
    (["--institutions=1", "--parts=x:0.5,institution1:0.5"],
     "--parts names institution1, which --institutions also makes; choose another name"),
    (["--institutions=0"], "Invalid value for '--institutions': 0 is not in the range x>=1."),
    (["--institutions=2", "--skew=nothing.txt"],
     "--skew=nothing.txt is neither a readable file nor a skew; expected CLASS=SHARE,SHARE,...;CLASS=... with a share, "
     "or *, for each institution, such as melanoma=0.3,0.05,*"),
    (["--institutions=2", "--skew==0.1,0.2"],
     "--skew: '=0.1,0.2' is not understood; expected CLASS=SHARE,SHARE,...;CLASS=... with a share, or *, for each "
     "institution, such as melanoma=0.3,0.05,*"),
    (["--institutions=2", "--skew=a=0.1,0.2;a=0.1,0.2"], "--skew names a twice; expected each class once"),
    (["--institutions=2", "--skew=a=0.1"], "--skew: a has 1 share; expected 2, one for each of --institutions=2"),
    (["--institutions=2", "--skew=a=*,*"], "--skew: a has * for 2 shares; expected at most one"),
    (["--institutions=2", "--skew=a=2,*"], "--skew: a: the share 2 is out of range; expected a number from 0 and up to "
                                           "1"),
    (["--institutions=2", "--skew=z=0.1,*"], "--skew names the class z, which the data set has no images of; expected "
                                             "one of a, b, c"),
    (["--institutions=2", "--skew=b=0.6,0.4"],
     "--skew needs 20 images of b; there are 12: lower its shares, put * for one of them, or use only 24 of 40 images "
     "with --leave-out"),
    (["--institutions=2", "--skew=b=0.1,0.1"],
     "--skew needs 32 images of a; there are 25: raise the shares of the classes it names, put * for one of them, or "
     "use only 31 of 40 images with --leave-out"),
    (["--institutions=2", "--skew=b=0.8,*"], "--skew needs 16 images of b for the institutions besides *; the data set "
                                             "has 12: lower these shares"),
    (["--institutions=2", "--sizes=0.9,0.1", "--skew=a=0.5,*"],
     "--skew leaves 7 images of a for institution2, which holds 4: raise the other shares"),
    (["--institutions=2", "--skew=a=0.6,*;b=0.5,*"], "--skew: the shares of institution1 sum to 1.1; expected at most "
                                                     "1"),
    (["--institutions=2", "--skew=a=0.5,0.5;b=0.2,0.2;c=0.1,0.1"],
     "--skew: the shares of institution1 sum to 0.8; expected 1, as all classes are named"),
    (["--parts=a:0.5,b:0.5", "--dest=none/there"], "--dest=none/there: there is no folder none; make it first"),
    (["--parts=a:0.5,b:0.5", "--dest=set.zip"], "--dest=set.zip is a file; expected a folder for the parts"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_split_command_bad_options_gives_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "set.zip", 40, labels=[0] * 25 + [1] * 12 + [2] * 3, classes=["a", "b", "c"])
    assert run(split_command, ["set.zip", *options]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {message}"]
    assert [item.name for item in tmp_path.iterdir()] == ["set.zip"]


def test_split_command_more_parts_than_groups_tells_both(tmp_path, capsys):
    path = make_set(tmp_path / "set.zip", 6, groups=["a", "a", "a", "b", "b", "b"])
    assert run(split_command, [str(path), f"--parts={THREE}"]) == 2
    assert capsys.readouterr().err == ("error: the data set has 2 groups; expected at least 3, one for each part "
                                       "(train, val, test): request fewer parts\n")


def test_split_command_lists_with_skew_is_refused(tmp_path, capsys):
    path = make_set(tmp_path / "set.zip", 6, labels=[[1.0, 0.0]] * 6)
    assert run(split_command, [str(path), "--institutions=2", "--skew=0=0.1,*"]) == 2
    assert capsys.readouterr().err == f"error: --skew needs labels, one class per image; in {path} they are lists of " \
                                      "numbers\n"


def test_split_command_file_that_is_no_png_is_named(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff\xd8\xff")
    assert run(split_command, [str(tmp_path / "photos"), "--parts=a:1"]) == 2
    photos = tmp_path / "photos"
    assert capsys.readouterr().err == (f"error: {photos}: a.jpg is not a PNG file; expected a data set for training: "
                                       f"make it with dataset_tool.py --source={photos} --dest=NAME.zip\n")
    assert [item.name for item in tmp_path.iterdir()] == ["photos"]


def test_split_command_damaged_member_is_named_and_nothing_written(tmp_path, capsys):
    path = make_set(tmp_path / "set.zip", 6)
    data = bytearray(path.read_bytes())
    place = data.find(b"IDAT", data.find(b"IDAT") + 4)  # in the second image
    data[place + 10] ^= 255
    path.write_bytes(data)
    assert run(split_command, [str(path), "--parts=a:0.5,b:0.5"]) == 2
    assert f"{path}: 00000/img00000001.png is damaged" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["set.zip"]


def test_split_command_existing_output_needs_force(tmp_path, capsys):
    path = make_set(tmp_path / "set.zip", 6)
    (tmp_path / "set-b.zip").write_bytes(b"old")
    arguments = [str(path), "--parts=a:0.5,b:0.5"]
    assert run(split_command, arguments) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path / 'set-b.zip'} exists; give --force to replace it, or choose "
                                       "another --dest\n")
    assert (tmp_path / "set-b.zip").read_bytes() == b"old"
    assert not (tmp_path / "set-a.zip").exists()
    assert run(split_command, [*arguments, "--force"]) == 0
    assert zipfile.ZipFile(tmp_path / "set-b.zip").testzip() is None


def test_split_command_folder_as_source_names_parts_after_it(tmp_path):
    make_set(tmp_path / "set", 8)
    assert run(split_command, [str(tmp_path / "set"), "--parts=a:0.5,b:0.5", f"--dest={tmp_path / 'new'}"]) == 0
    assert sorted(item.name for item in (tmp_path / "new").iterdir()) == ["set-a.zip", "set-b.zip", "set-split.json"]


@pytest.mark.parametrize("name", ["inside/lesions.zip", "inside/lesions"])
def test_split_of_a_set_in_a_folder_inside_keeps_groups_together(tmp_path, name):
    groups = [f"lesion{index % 15}" for index in range(60)]
    flat = make_set(tmp_path / "lesions.zip", 60, labels=[index % 3 for index in range(60)], groups=groups)
    (tmp_path / "inside").mkdir()
    inside = enclose(flat, tmp_path / name)
    found = {}
    for path in (flat, inside):
        assert run(split_command, [str(path), "--parts=train:0.5,test:0.5", f"--dest={tmp_path / 'out'}",
                                   "--force"]) == 0
        found[path] = [ImageSet(tmp_path / f"out/lesions-{part}.zip") for part in ("train", "test")]
        found[path] = [(images.groups, images.labels.tolist(), images.checksums()) for images in found[path]]
    (train, _, _), (test, _, _) = found[inside]
    assert not set(train) & set(test)
    assert len({*train, *test}) == 15
    assert found[inside] == found[flat]
