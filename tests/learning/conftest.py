from tests.small import dataset, make_model  # noqa: F401 - fixtures
