"""Test the files for the Embedding Projector by asking TensorBoard's own plugin for what they hold."""

import io
import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from analysis.embedding_points import REAL, SYNTHETIC
from analysis.tensorboard_projector import check_projector_folder, write_projector_files
from dnnlib.cli import UserError
from tests.helpers.made_embedding import NASTY, make_embedding


class Server:
    """TensorBoard's projector of a folder."""

    def __init__(self, folder):
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        plugin = ProjectorPlugin(TBContext(logdir=str(folder), multiplexer=multiplexer,
                                           data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
        self.apps = {name: Client(app) for name, app in plugin.get_plugin_apps().items()}

    def get(self, route, **query):
        answer = self.apps[f"/{route}"].get(f"/{route}", query_string=query)
        assert answer.status_code == 200, answer.data
        return answer.data

    def info(self):
        run, = json.loads(self.get("runs"))
        one, = json.loads(self.get("info", run=run))["embeddings"]
        return run, one


def features_of(embedding, size=8):
    return np.random.RandomState(0).randn(len(embedding.points), size).astype(np.float32)


def tile(sheet, side, point, count):
    row, column = divmod(point, int(np.ceil(np.sqrt(count))))
    return sheet[side * row:side * row + side, side * column:side * column + side].astype(float)


def read_sheet(folder):
    return np.asarray(PIL.Image.open(folder / "sprite.jpg"))


def test_tensorboard_opens_the_features_facts_and_pictures(tmp_path):
    embedding = make_embedding(60, 30, 20, hidden=())
    features = features_of(embedding)
    write_projector_files(tmp_path / "files", embedding, features)
    server = Server(tmp_path / "files")
    run, info = server.info()
    name = info["tensorName"]
    assert (name, info["tensorShape"], info["sprite"]["singleImageDim"]) == ("efficientnet-lite0", [110, 8], [16, 16])
    shown = np.frombuffer(server.get("tensor", run=run, name=name), dtype=np.float32).reshape(110, 8)
    assert np.array_equal(shown, features)
    lines = server.get("metadata", run=run, name=name).decode().splitlines()
    assert lines[0].split("\t") == ["name", "set", "kind", "class", "group", "localization", "age"]
    assert lines[1].split("\t")[:3] == ["00000/img00000000.png", "real.zip", "real"]
    assert len(lines) == 1 + 110
    sheet = np.asarray(PIL.Image.open(io.BytesIO(server.get("sprite_image", run=run, name=name))))
    assert sheet.shape == (11 * 16, 11 * 16, 3)
    for point in (0, 10, 11, 109):
        errors = ((embedding.thumbnails - tile(sheet, 16, point, 110)) ** 2).mean(axis=(1, 2, 3))
        assert errors.argmin() == point


def test_points_without_pictures_are_tiles_of_one_color_by_set(tmp_path):
    write_projector_files(tmp_path, embedding := make_embedding(60, 30, 20, hidden=(REAL, SYNTHETIC)),
                          features_of(embedding))
    sheet = read_sheet(tmp_path)
    real, other, synthetic, projected = (tile(sheet, 16, point, 110) for point in (0, 59, 60, 90))
    assert np.abs(real - [86, 180, 233]).max() < 4
    assert np.abs(other - [86, 180, 233]).max() < 4
    assert np.abs(synthetic - [230, 159, 0]).max() < 4
    assert projected.std() > 10


def test_sheet_of_many_points_has_smaller_tiles_that_tensorboard_can_draw(tmp_path):
    embedding = make_embedding(17000, 0, 0, side=64)
    write_projector_files(tmp_path, replace(embedding, thumbnails=np.empty((0, 64, 64, 3), dtype=np.uint8)),
                          features_of(embedding, 2))
    assert read_sheet(tmp_path).shape == (131 * 56, 131 * 56, 3)
    assert Server(tmp_path).info()[1]["sprite"]["singleImageDim"] == [56, 56]


def test_names_with_tabs_and_line_breaks_stay_in_their_fields(tmp_path):
    nasty = f"{NASTY}\t\r\nx\x0b\x85y"
    write_projector_files(tmp_path, embedding := make_embedding(60, 30, 20, nasty=nasty), features_of(embedding))
    lines = (tmp_path / "metadata.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 110
    assert {line.count("\t") for line in lines} == {6}
    assert "\U0001f600\\udcff x y" in lines[1]


def test_files_are_the_same_for_the_same_embedding_and_replace_earlier_ones(tmp_path):
    embedding = make_embedding()
    write_projector_files(tmp_path, embedding, features_of(embedding) + 1)
    contents = []
    for _ in range(2):
        write_projector_files(tmp_path, embedding, features_of(embedding))
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"projector_config.pbtxt", "features.bytes", "metadata.tsv", "sprite.jpg"}


def test_folder_with_other_files_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "events.out").write_text("of a run")
    message = (f"--tensorboard={tmp_path} holds other files (events.out); expected a new or empty folder, or one that "
               "this command wrote: choose another")
    with pytest.raises(UserError) as error:
        write_projector_files(tmp_path, embedding := make_embedding(), features_of(embedding))
    assert str(error.value) == message
    assert [file.name for file in tmp_path.iterdir()] == ["events.out"]


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError) as error:
        check_projector_folder(path)
    assert str(error.value) == f"--tensorboard={path} is a file; expected a folder: choose another name"
