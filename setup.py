"""Builds diffmf_ops._C with CMake and Ninja. Needs a C++17 compiler; neither torch nor a GPU.

DIFFMF_CUDA=on|off|auto   build the CUDA kernels (default auto: when nvcc is found)
DIFFMF_CUDA_ARCHS=80-real;90   architectures to build them for (default: of this machine's GPUs, or these without one)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        source = Path(__file__).resolve().parent
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            "-DDIFFMF_PYTHON=ON", "-DDIFFMF_TESTS=OFF", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # The last build's, which CMake remembers, may have been in an environment that is gone.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DDIFFMF_CUDA={os.environ.get('DIFFMF_CUDA', 'auto')}",
            f"-DDIFFMF_CUDA_ARCHS={os.environ.get('DIFFMF_CUDA_ARCHS', 'auto')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]  # fmt: skip
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("diffmf_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
