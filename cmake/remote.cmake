# The kinds of remote that a store can have. Each adds to xkv_dependencies and xkv_remote_definitions; the modules of
# pkg-config go into the installed package files (cmake/install.cmake).
set(xkv_remote_definitions "")
set(xkv_remote_modules "")
set(xkv_remote_requires "")

function(xkv_remote kind module least)
    if(NOT ${kind} MATCHES "^(AUTO|ON|OFF)$")
        message(FATAL_ERROR "${kind} is '${${kind}}'; it must be AUTO, ON or OFF")
    endif()
    if(${kind} STREQUAL "OFF")
        message(STATUS "Remote tier: without ${module}, ${kind}=OFF")
        return()
    endif()
    pkg_check_modules(${kind}_LIB IMPORTED_TARGET ${module}>=${least})
    if(${kind}_LIB_FOUND)
        # hiredis asks for -D_FILE_OFFSET_BITS=64, which on 64-bit systems only renames calls, in all of the library.
        set_target_properties(PkgConfig::${kind}_LIB PROPERTIES INTERFACE_COMPILE_OPTIONS "")
        message(STATUS "Remote tier: with ${module} ${${kind}_LIB_VERSION}")
        set(xkv_dependencies ${xkv_dependencies} PkgConfig::${kind}_LIB PARENT_SCOPE)
        set(xkv_remote_definitions ${xkv_remote_definitions} ${kind} PARENT_SCOPE)
        set(xkv_remote_requires "${xkv_remote_requires}, ${module} >= ${least}" PARENT_SCOPE)
        set(xkv_remote_modules
            "${xkv_remote_modules}    pkg_check_modules(${kind}_LIB REQUIRED IMPORTED_TARGET ${module}>=${least})\n"
            PARENT_SCOPE)
    elseif(${kind} STREQUAL "ON")
        message(FATAL_ERROR "${kind}=ON, but ${module} >= ${least} was not found. Configure with -D${kind}=OFF")
    else()
        message(STATUS "Remote tier: without ${module}, which was not found")
    endif()
endfunction()

xkv_remote(XKV_S3 libcurl 7.85)
xkv_remote(XKV_REDIS hiredis 0.14)
