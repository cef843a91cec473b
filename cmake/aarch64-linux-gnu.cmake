# Builds for aarch64 on a Debian machine of another kind: with Debian's cross compiler, against its
# arm64 libraries, and with its qemu-user to run what was built. The compiler of Cap'n Proto schemas
# is the host's. `tests/run --aarch64` installs all that this needs.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)

# Cap'n Proto's configuration asks pkg-config for its libraries.
set(ENV{PKG_CONFIG_LIBDIR} /usr/lib/aarch64-linux-gnu/pkgconfig:/usr/share/pkgconfig)
