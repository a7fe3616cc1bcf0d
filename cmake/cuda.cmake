# The CUDA kernels, as a module of their own: _native, with the CPU kernels, loads whatever becomes of this one.

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  # Machine code for every generation from Turing on, as far as the compiler has it, PTX of the newest for those to
  # come, and of 8.0 for those between, like Thor's 11.0. CMAKE_CUDA_ARCHITECTURES, or the environment's
  # CUDAARCHS, takes its place. OFF keeps CMake from noting the compiler's own default, which the next run would take for
  # the user's choice.
  set(choose_architectures FALSE)
  if("${CMAKE_CUDA_ARCHITECTURES}$ENV{CUDAARCHS}" STREQUAL "")
    set(choose_architectures TRUE)
    set(CMAKE_CUDA_ARCHITECTURES OFF)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit)
  if(choose_architectures)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
    set(CMAKE_CUDA_ARCHITECTURES)
    foreach(architecture 75 80 86 89 90 100 120)
      if(known MATCHES "sm_${architecture}\n")
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture}-real)
        set(newest ${architecture})
      endif()
    endforeach()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual 80-virtual)
  endif()
endif()

set(missing)
if(NOT CMAKE_CUDA_COMPILER)
  set(missing "no CUDA compiler was found, or the one found cannot build (CMake's log says why). Set CUDACXX to nvcc's \
path, or put nvcc into PATH")
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
  set(missing "they need CUDA 12 or 13, found ${CMAKE_CUDA_COMPILER_VERSION} at ${CMAKE_CUDA_COMPILER}. Set CUDACXX to \
the nvcc of such a one")
elseif(NOT TARGET CUDA::cudart_static)
  set(missing "the toolkit of ${CMAKE_CUDA_COMPILER} has no libcudart_static.a. Set CUDACXX to the nvcc of a complete one")
endif()
if(missing)
  if(JAX_DCN_CUDA STREQUAL "AUTO")
    message(STATUS "jax_dcn: without CUDA kernels: ${missing}")
    return()
  endif()
  message(FATAL_ERROR "jax_dcn: JAX_DCN_CUDA=${JAX_DCN_CUDA} asks for CUDA kernels, but ${missing}. "
                      "-DJAX_DCN_CUDA=OFF builds without them")
endif()

# The names that users know: 90-real is 90, and 90-virtual is PTX, for 90 and all later ones.
set(architectures ${CMAKE_CUDA_ARCHITECTURES})
if(architectures STREQUAL "native")
  set(architectures ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
endif()
string(REPLACE "-real" "" architectures "${architectures}")
string(REGEX REPLACE "([^;]+)-virtual" "\\1+PTX" architectures "${architectures}")
string(REPLACE ";" " " architectures "${architectures}")
message(STATUS "jax_dcn: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, kernels for ${architectures}")

file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(kernels_cuda OBJECT ${sources})
jax_dcn_options(kernels_cuda)
target_compile_definitions(kernels_cuda PRIVATE "JAX_DCN_CUDA_ARCHITECTURES=\"${architectures}\"")
# nvcc takes the architectures one after the other unless it is told so.
target_compile_options(kernels_cuda PRIVATE --threads=4)
set_target_properties(kernels_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)

# CUDA's runtime is linked statically. It opens the driver's libcuda.so.1 at its first call, so the module loads where
# there is none.
jax_dcn_module(_native_cuda csrc/ffi/module_cuda.cc csrc/ffi/cuda.cc)
set_target_properties(_native_cuda PROPERTIES LINKER_LANGUAGE CXX)
target_link_libraries(_native_cuda PRIVATE kernels_cuda CUDA::cudart_static)
