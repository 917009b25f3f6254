"""The protocols. Importing the package makes every kind of correlation known, which is all a dealer needs of it."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
