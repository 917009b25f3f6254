"""For users of CrypTen 0.4.1: its models deploy, its secret shares move over and back, and it imports on current torch.

docs/migrate-from-crypten.md has the calls of both side by side.
"""

from mpcinfer.interop.crypten.model import from_crypten
from mpcinfer.interop.crypten.shares import export_shares, import_shares
from mpcinfer.interop.crypten.shim import install_shim

__all__ = ["export_shares", "from_crypten", "import_shares", "install_shim"]
