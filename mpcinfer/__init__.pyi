# What type checkers see of the package; at run time `__init__.py` loads each of these on first use. As a stub it is not
# an import of the client by everything that asks for the version.

from mpcinfer.client.aio import AsyncClient as AsyncClient
from mpcinfer.client.audit import Audit as Audit
from mpcinfer.client.data import Client as Client
from mpcinfer.client.owner import Deployed as Deployed
from mpcinfer.client.owner import ModelOwner as ModelOwner
from mpcinfer.errors import AbortedError as AbortedError
from mpcinfer.errors import AgreementError as AgreementError
from mpcinfer.errors import BudgetError as BudgetError
from mpcinfer.errors import BusyError as BusyError
from mpcinfer.errors import ConfigError as ConfigError
from mpcinfer.errors import ConflictError as ConflictError
from mpcinfer.errors import ContextLengthError as ContextLengthError
from mpcinfer.errors import DeadlineError as DeadlineError
from mpcinfer.errors import DtypeError as DtypeError
from mpcinfer.errors import ForbiddenError as ForbiddenError
from mpcinfer.errors import GrantError as GrantError
from mpcinfer.errors import IdentityError as IdentityError
from mpcinfer.errors import InputError as InputError
from mpcinfer.errors import ManifestError as ManifestError
from mpcinfer.errors import MpcInferError as MpcInferError
from mpcinfer.errors import NotFoundError as NotFoundError
from mpcinfer.errors import ProtocolError as ProtocolError
from mpcinfer.errors import RangeError as RangeError
from mpcinfer.errors import ShapeError as ShapeError
from mpcinfer.errors import SignatureError as SignatureError
from mpcinfer.errors import StoreError as StoreError
from mpcinfer.errors import TamperingError as TamperingError
from mpcinfer.errors import UnavailableError as UnavailableError
from mpcinfer.errors import UnsupportedError as UnsupportedError
from mpcinfer.errors import UploadError as UploadError
from mpcinfer.trust.grant import Budget as Budget
from mpcinfer.trust.grant import Terms as Terms

__version__: str
__all__: list[str]
