# Libraries, headers, the CMake package and the pkg-config file. The tools install themselves (cli/CMakeLists.txt).
# Components, for packages: library, development, tools.
include(CMakePackageConfigHelpers)
set(xkv_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/xkv)

install(FILES format/xkv/common.h format/xkv/format.h kernels/xkv/kernels.h codec/xkv/codec.h
    store/xkv/store.h store/xkv/hook.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/xkv COMPONENT development)
# Two export sets, because only the static library needs the dependencies' development files.
install(TARGETS xkv_shared EXPORT xkvTargets
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library NAMELINK_COMPONENT development
    RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT library)
install(TARGETS xkv_static EXPORT xkvStaticTargets
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
install(EXPORT xkvTargets NAMESPACE xkv:: DESTINATION ${xkv_package_dir} COMPONENT development)
install(EXPORT xkvStaticTargets NAMESPACE xkv:: DESTINATION ${xkv_package_dir} COMPONENT development)

configure_package_config_file(cmake/xkvConfig.cmake.in ${PROJECT_BINARY_DIR}/xkvConfig.cmake
    INSTALL_DESTINATION ${xkv_package_dir})
# Before 1.0 a minor release may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/xkvConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/xkvConfig.cmake ${PROJECT_BINARY_DIR}/xkvConfigVersion.cmake
    DESTINATION ${xkv_package_dir} COMPONENT development)

# The prefix is found from where the file lies, so that an installed tree can be moved.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}" OR IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
    set(xkv_pc_prefix ${CMAKE_INSTALL_PREFIX})
    set(xkv_pc_libdir ${CMAKE_INSTALL_FULL_LIBDIR})
    set(xkv_pc_includedir ${CMAKE_INSTALL_FULL_INCLUDEDIR})
else()
    file(RELATIVE_PATH xkv_pc_up /p/${CMAKE_INSTALL_LIBDIR}/pkgconfig /p)
    string(REGEX REPLACE "/$" "" xkv_pc_up "${xkv_pc_up}")
    set(xkv_pc_prefix "\${pcfiledir}/${xkv_pc_up}")
    set(xkv_pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
    set(xkv_pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file(cmake/xkv.pc.in ${PROJECT_BINARY_DIR}/xkv.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/xkv.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT development)
