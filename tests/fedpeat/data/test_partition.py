import inspect

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets import partitioner as flower

from fedpeat.core import ConfigError, DataError
from fedpeat.data import DataSpec
from fedpeat.data.partition import label_field, partition
from tests.fedpeat.data.corpus import documents

COUNT = 120
TABLE = Dataset.from_list(documents(COUNT))
KIND = {"partition_by": "kind"}
FLOWER = {
    "Iid": {},
    "Linear": {},
    "Square": {},
    "Exponential": {},
    "Size": {"partition_sizes": [30, 20, 10]},
    "IdToSizeFnc": {"partition_id_to_size_fn": "numpy.exp"},
    "Dirichlet": {**KIND, "alpha": 0.5, "min_partition_size": 1},
    "InnerDirichlet": {**KIND, "alpha": 0.5, "partition_sizes": [40, 40, 30]},
    "Pathological": {**KIND, "num_classes_per_partition": 1},
    "Shard": {**KIND, "num_shards_per_partition": 2, "shard_size": 9},
    "Distribution": {
        **KIND,
        "distribution_array": [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 2,
    },
    "NaturalId": {"partition_by": "who"},
    "GroupedNaturalId": {"partition_by": "who", "group_size": 2},
    "Continuous": {"partition_by": "age", "strictness": 0.8},
}


def spec_of(**settings):
    return DataSpec.of({"kind": "jsonl", "path": "x", "block_size": 6, **settings})


def split(table=TABLE, count=3, seed=0, **settings):
    return partition(table, spec_of(**settings), clients_count=count, seed=seed)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_every_partitioner_of_rows_is_tried_here():
    names = {name.removesuffix("Partitioner") for name in flower.__all__} - {""}
    assert names - set(FLOWER) == {"VerticalEven", "VerticalSize"}


@pytest.mark.parametrize("name", FLOWER)
def test_each_partitioner_accounts_for_every_row_and_follows_the_seed(name):
    settings = {"partitioner": name, "partitioner_options": FLOWER[name]}
    one, again, other = split(**settings), split(**settings), split(seed=1, **settings)
    given = np.concatenate(list(one.clients.values()))
    assert len(set(given.tolist())) == len(given) == COUNT - one.left_out
    assert all((np.diff(rows) > 0).all() for rows in one.clients.values())
    assert same(one.clients, again.clients)
    by_data_alone = {"NaturalId", "GroupedNaturalId"}
    assert same(one.clients, other.clients) == (name in by_data_alone)
    assert one.is_natural == (
        "num_partitions" not in inspect.signature(getattr(flower, name + "Partitioner")).parameters
    )


def test_rows_that_a_partitioner_leaves_out_are_counted():
    assert split(partitioner="Size", partitioner_options={"partition_sizes": [30, 20, 10]}).left_out == COUNT - 60


@pytest.mark.parametrize("name", ["dirichlet", "Dirichlet", "DirichletPartitioner", "dirichlet_partitioner"])
def test_a_partitioner_has_many_spellings(name):
    settings = {"partitioner_options": FLOWER["Dirichlet"]}
    assert same(split(partitioner=name, **settings).clients, split(partitioner="Dirichlet", **settings).clients)


def test_the_field_to_partition_by_is_the_client_field_if_no_other_is_given():
    options = {"alpha": 0.5, "min_partition_size": 1}
    settings = {"partitioner": "Dirichlet", "partitioner_options": options}
    named = split(partitioner="Dirichlet", partitioner_options={**options, "partition_by": "who"})
    assert same(split(client_field="who", **settings).clients, named.clients)
    assert label_field(spec_of(label_field="kind", partitioner_options={"partition_by": "who"})) == "kind"
    assert label_field(spec_of(partitioner_options={"partition_by": "who"})) == "who"


def test_natural_clients_are_named_by_their_values():
    found = split(count=None, client_field="who")
    assert list(found.clients) == ["c0", "c1", "c2", "c3"]
    assert found.clients["c1"].tolist() == list(range(1, COUNT, 4))
    assert found.is_natural
    assert list(split(count=None, client_field=["who", "kind"]).clients)[:2] == ["c0/0", "c0/1"]
    by_flower = split(partitioner="NaturalId", partitioner_options={"partition_by": "who"})
    assert same(found.clients, by_flower.clients)


def test_names_are_kept_apart():
    table = Dataset.from_list(
        [{"a": "x/y", "b": "z"}, {"a": "x", "b": "y/z"}, {"a": None, "b": "z"}, {"a": "", "b": "z"}]
    )
    found = split(table, count=None, client_field=["a", "b"])
    assert list(found.clients) == ["x/y/z", "x/y/z (2)"]
    assert found.without_client == 2
    servers = Dataset.from_list([{"a": "server"}, {"a": "all clients"}])
    assert list(split(servers, count=None, client_field="a").clients) == ["all clients (2)", "server (2)"]


def test_without_a_field_rows_are_dealt_out_evenly():
    found = split(count=7)
    assert sorted(len(rows) for rows in found.clients.values()) == [17] * 6 + [18]
    assert sorted(np.concatenate(list(found.clients.values())).tolist()) == list(range(COUNT))
    assert list(split(count=12).clients)[:2] == ["client-00", "client-01"]
    assert not same(found.clients, split(count=7, seed=1).clients)
    # Documents of one source stand together in a file: a client gets some from all over it.
    assert all(np.ptp(rows) > COUNT / 2 for rows in found.clients.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": COUNT + 1}, f"there are {COUNT} documents"),
        ({"count": COUNT + 1, "partitioner": "Iid"}, f"set clients.count <= {COUNT}"),
        ({"client_field": "whom"}, "did you mean 'who'"),
        ({"partitioner": "Dirichlte"}, "did you mean 'Dirichlet'"),
        ({"partitioner": "VerticalEven"}, "it splits columns"),
        ({"partitioner": "Dirichlet", "partitioner_options": KIND}, "data.partitioner_options.alpha=..."),
        ({"partitioner": "Dirichlet", "partitioner_options": {"alpah": 1}}, "did you mean 'alpha'"),
        ({"partitioner": "Dirichlet", "partitioner_options": {"alpha": -1, **KIND}}, "strictly greater than zero"),
        (
            {"partitioner": "Dirichlet", "partitioner_options": {"alpha": 1, "partition_by": "knd"}},
            "did you mean 'kind'",
        ),
        ({"partitioner": "IdToSizeFnc", "partitioner_options": {"partition_id_to_size_fn": "math.nope"}}, "numpy.exp"),
        ({"partitioner": "Size", "partitioner_options": {"partition_sizes": [200]}}, "cannot partition by SizePart"),
        ({"partitioner_options": {"alpha": 1}}, "natural clients have none"),
    ],
)
def test_what_cannot_be_partitioned_is_told(settings, message):
    with pytest.raises(DataError, match=message):
        split(**settings)


@pytest.mark.parametrize(("count", "message"), [(None, "number of clients is not set"), (0, "there must be a client")])
def test_the_number_of_clients_is_needed_where_the_data_names_none(count, message):
    with pytest.raises(ConfigError, match=message):
        split(count=count)


def test_a_field_of_nothing_names_no_clients():
    with pytest.raises(DataError, match="empty in each row"):
        split(Dataset.from_list([{"who": None}, {"who": ""}]), client_field="who")
