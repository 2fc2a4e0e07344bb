# Debian packages by cpack: libxkv0, libxkv-dev and xkv-tools. Made for /usr by the preset "deb".
set(XKV_MAINTAINER "xkv maintainers <maintainers@xkv.invalid>" CACHE STRING "Maintainer named in Debian packages")
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME xkv)
set(CPACK_PACKAGE_VENDOR xkv)
set(CPACK_PACKAGE_CONTACT "${XKV_MAINTAINER}")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "") # each package has its own, the first line of its description
set(CPACK_PACKAGE_CHECKSUM SHA256)
set(CPACK_PACKAGING_INSTALL_PREFIX "${CMAKE_INSTALL_PREFIX}")
set(CPACK_STRIP_FILES ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE
    WORLD_READ WORLD_EXECUTE)
set(CPACK_COMPONENTS_ALL library development)
if(XKV_TOOLS)
    list(APPEND CPACK_COMPONENTS_ALL tools)
endif()

set(xkv_deb_revision 1)
set(xkv_deb_version ${PROJECT_VERSION}-${xkv_deb_revision})
set(xkv_deb_library libxkv${XKV_ABI_VERSION})
set(CPACK_DEBIAN_PACKAGE_RELEASE ${xkv_deb_revision})
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEB_COMPONENT_INSTALL ON)

# What other packages and libraries are needed, and with which versions, is read from the files.
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS ${PROJECT_BINARY_DIR})

set(CPACK_DEBIAN_LIBRARY_PACKAGE_NAME ${xkv_deb_library})
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SECTION libs)
set(CPACK_COMPONENT_LIBRARY_DESCRIPTION "codec and store for KV caches of language models - library
libxkv packs the KV caches of language models, lossless or with a measured
loss, restores any prefix of them, and keeps them in a store where the
longest one that a prompt begins with is found.")
file(WRITE ${PROJECT_BINARY_DIR}/debian/shlibs "libxkv ${XKV_ABI_VERSION} ${xkv_deb_library} (>= ${PROJECT_VERSION})\n")
file(WRITE ${PROJECT_BINARY_DIR}/debian/triggers "activate-noawait ldconfig\n")
set(CPACK_DEBIAN_LIBRARY_PACKAGE_CONTROL_EXTRA ${PROJECT_BINARY_DIR}/debian/shlibs
    ${PROJECT_BINARY_DIR}/debian/triggers)

# Programs that link the static library, and pkg-config, need what Requires.private of xkv.pc names.
set(xkv_deb_dev_depends "${xkv_deb_library} (= ${xkv_deb_version})" libzstd-dev libxxhash-dev libjansson-dev
    libopenblas-dev liblmdb-dev libssl-dev libsodium-dev)
if(XKV_S3_LIB_FOUND)
    list(APPEND xkv_deb_dev_depends "libcurl4-openssl-dev | libcurl4-gnutls-dev")
endif()
if(XKV_REDIS_LIB_FOUND)
    list(APPEND xkv_deb_dev_depends libhiredis-dev)
endif()
string(REPLACE ";" ", " xkv_deb_dev_depends "${xkv_deb_dev_depends}")
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libxkv-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS "${xkv_deb_dev_depends}")
set(CPACK_COMPONENT_DEVELOPMENT_DESCRIPTION "codec and store for KV caches of language models - development
Headers, the static library, and files for CMake and pkg-config of libxkv.")

set(CPACK_DEBIAN_TOOLS_PACKAGE_NAME xkv-tools)
set(CPACK_DEBIAN_TOOLS_PACKAGE_SECTION utils)
set(CPACK_DEBIAN_TOOLS_PACKAGE_DEPENDS "${xkv_deb_library} (= ${xkv_deb_version})")
set(CPACK_COMPONENT_TOOLS_DESCRIPTION "codec and store for KV caches of language models - tools
xkv-pack, xkv-unpack and xkv-info pack, restore and describe KV caches of
language models, xkv-train makes dictionaries for them, and xkv-store keeps
them where the longest one that a prompt begins with is found.")

# Files that only packages have: copyright, changelog; and manual pages are compressed there.
set(CPACK_PRE_BUILD_SCRIPTS ${PROJECT_SOURCE_DIR}/cmake/debian/documents.cmake)
configure_file(cmake/debian/copyright.in ${PROJECT_BINARY_DIR}/debian/copyright @ONLY)
string(TIMESTAMP xkv_deb_date "%a, %d %b %Y %H:%M:%S +0000" UTC) # of $SOURCE_DATE_EPOCH where that is set
configure_file(cmake/debian/changelog.in ${PROJECT_BINARY_DIR}/debian/changelog @ONLY)
set(CPACK_XKV_DOCUMENTS ${PROJECT_BINARY_DIR}/debian)
set(CPACK_XKV_PACKAGES library ${xkv_deb_library} development libxkv-dev tools xkv-tools)
include(CPack)
