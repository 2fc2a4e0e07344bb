# Toolchain file: AArch64 Linux with Debian's cross compiler and arm64 libraries; tests run under qemu's user mode.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc CACHE FILEPATH "C compiler for AArch64")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 CACHE FILEPATH "Runs AArch64 programs here")

# Debian keeps the libraries of all architectures in one tree: only pkg-config must be told which ones are meant.
if(NOT DEFINED ENV{PKG_CONFIG_LIBDIR})
    set(ENV{PKG_CONFIG_LIBDIR} /usr/lib/aarch64-linux-gnu/pkgconfig:/usr/share/pkgconfig)
endif()
