"""Training steps are compiled here, and run a few times only."""

from tests.models.conftest import compile_quickly as compile_quickly
from tests.models.conftest import smooth as smooth
