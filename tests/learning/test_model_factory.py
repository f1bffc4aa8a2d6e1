"""Functions that make models, and those that do not."""

import pytest
import torch

from MILS.bag_model import BagModel
from tests.learning.runs import make_cv, small
from utils.core.errors import ConfigError


class TestRefusals:
    def test_a_factory_of_one_shared_model(self, dataset, tmp_path):
        model = small()
        with pytest.raises(ConfigError, match="returns one shared model; make a new one at every call"):
            make_cv(dataset, tmp_path, lambda: model)

    def test_a_factory_whose_models_share_a_layer(self, dataset, tmp_path):
        layer = torch.nn.Linear(4, 4)

        def factory():
            model = small()
            model.shared = layer
            return model

        with pytest.raises(ConfigError, match="shared model"):
            make_cv(dataset, tmp_path, factory)

    def test_a_model_in_the_place_of_its_factory(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match=r"a function that makes a model, found a LiteMIL; each .* a fresh one"):
            make_cv(dataset, tmp_path, small())

    def test_models_that_cannot_be_named(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match=r"lambda.*no name by which a checkpoint could find it; give a class"):
            make_cv(dataset, tmp_path, lambda: torch.nn.Linear(16, 2))

    def test_a_model_that_is_not_registered(self, dataset, tmp_path):
        class Mine(BagModel):
            """Known to nobody."""

            def __init__(self, input_dim, num_classes):
                super().__init__(input_dim, num_classes)
                self.head = torch.nn.Linear(input_dim, num_classes)

        with pytest.raises(ConfigError, match=r"checkpoint of Mine .*unknown model 'Mine'.*decorate.*register_mil"):
            make_cv(dataset, tmp_path, lambda: Mine(16, 2))

    def test_a_model_that_its_spec_does_not_make(self, dataset, tmp_path):
        def factory():
            model = small("meanPool")
            model.classifier = torch.nn.Linear(16, 2)
            return model

        message = r"spec of meanPool makes another model .they differ in classifier.*; hand every"
        with pytest.raises(ConfigError, match=message):
            make_cv(dataset, tmp_path, factory)

    def test_a_model_of_another_s_name(self, dataset, tmp_path):
        class LiteMIL(BagModel):
            """Not the one that is registered."""

            def __init__(self, input_dim, num_classes):
                super().__init__(input_dim, num_classes)
                self.map = torch.nn.Linear(input_dim, num_classes)

        with pytest.raises(ConfigError, match="LiteMIL is the name of another model; rename the class"):
            make_cv(dataset, tmp_path, lambda: LiteMIL(16, 2))
