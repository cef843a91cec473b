# What `cmake --install` gives: the public header, the library, and what find_package(CapnpShm) and
# pkg-config need to find them. Everything is relative to the prefix, so that the installed tree may
# be moved, and `cmake --install --prefix` works.
include(CMakePackageConfigHelpers)

set(CAPNP_SHM_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/CapnpShm)

install(TARGETS capnp-shm EXPORT CapnpShmTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${PROJECT_SOURCE_DIR}/src/capnp-shm/rpc-shm.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/capnp-shm)
install(EXPORT CapnpShmTargets NAMESPACE CapnpShm:: DESTINATION ${CAPNP_SHM_CMAKE_DIR})

configure_package_config_file(
  ${CMAKE_CURRENT_LIST_DIR}/CapnpShmConfig.cmake.in ${PROJECT_BINARY_DIR}/CapnpShmConfig.cmake
  INSTALL_DESTINATION ${CAPNP_SHM_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/CapnpShmConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/CapnpShmConfig.cmake ${PROJECT_BINARY_DIR}/CapnpShmConfigVersion.cmake
  DESTINATION ${CAPNP_SHM_CMAKE_DIR})

set(CAPNP_SHM_PC_DIR ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
# From the .pc file to the prefix, unless the packager chose absolute directories.
file(RELATIVE_PATH CAPNP_SHM_PC_UP
  ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" CAPNP_SHM_PC_UP "${CAPNP_SHM_PC_UP}")
foreach(dir LIBDIR INCLUDEDIR)
  if(IS_ABSOLUTE ${CMAKE_INSTALL_${dir}})
    set(CAPNP_SHM_PC_${dir} ${CMAKE_INSTALL_${dir}})
  else()
    set(CAPNP_SHM_PC_${dir} "\${prefix}/${CMAKE_INSTALL_${dir}}")
  endif()
endforeach()
configure_file(${CMAKE_CURRENT_LIST_DIR}/capnp-shm.pc.in ${PROJECT_BINARY_DIR}/capnp-shm.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/capnp-shm.pc DESTINATION ${CAPNP_SHM_PC_DIR})
