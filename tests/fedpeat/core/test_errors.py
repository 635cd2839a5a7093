import pickle

from fedpeat.core import ConfigError, FedPeatError, nearest, shorten


def test_an_error_has_three_parts_and_survives_a_process_boundary():
    error = ConfigError("cannot keep 14 blocks", "there are 10", "keep fewer")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ConfigError)
    assert (again.asked, again.found, again.remedy) == ("cannot keep 14 blocks", "there are 10", "keep fewer")
    assert str(error) == "cannot keep 14 blocks; there are 10; keep fewer"
    assert str(FedPeatError("alone")) == "alone"


def test_long_lists_are_cut_and_near_words_are_suggested():
    assert shorten(range(3)) == "0, 1, 2"
    assert shorten(range(30)).endswith("and 20 more")
    assert "'learning_rate'" in nearest("lerning_rate", ["learning_rate", "seed"])
    assert nearest("zzz", ["b", "a"]) == "choose from: a, b"
