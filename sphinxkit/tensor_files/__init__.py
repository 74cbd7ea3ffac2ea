"""Files of tensors by name, whatever they mean: read lazily from mapped memory, written tensor by tensor."""

from sphinxkit.tensor_files.checksums import Check, compare, file_sha256
from sphinxkit.tensor_files.files import TensorFiles, read_json, read_tensor_files
from sphinxkit.tensor_files.files import open_tensor_files as open
from sphinxkit.tensor_files.lazy import LazySource, LazyTensor, StoredTensor
from sphinxkit.tensor_files.safetensors import read_safetensors, write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec, WrittenFile
from sphinxkit.tensor_files.torch_zip import TorchFileWriter, read_torch_file, zip_checks

__all__ = [
    "Check",
    "LazySource",
    "LazyTensor",
    "StoredTensor",
    "TensorFiles",
    "TensorSpec",
    "TorchFileWriter",
    "WrittenFile",
    "compare",
    "file_sha256",
    "open",
    "read_json",
    "read_safetensors",
    "read_tensor_files",
    "read_torch_file",
    "write_safetensors",
    "zip_checks",
]
