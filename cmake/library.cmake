# SPDX-License-Identifier: Apache-2.0
# library.cmake: how the libraries are made and installed.

# hide_names(target): all but those that the public headers declare (their #pragma says so).
function(hide_names target)
  set_target_properties(${target} PROPERTIES C_VISIBILITY_PRESET hidden
    CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
endfunction()

# add_static_library(target output archive): what is in the archive as one object in which every hidden
# name is local, and what the compiler makes for OpenMP (-d: it has no place yet), so that it meets no
# other library's names in a program. nvcc's temporary files have other names each time.
function(add_static_library target output archive)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${target}.o)
  add_custom_command(OUTPUT ${object}
    COMMAND ${CMAKE_LINKER} -r -d --force-group-allocation -o ${object}
      --whole-archive $<TARGET_FILE:${archive}>
    COMMAND ${CMAKE_OBJCOPY} --localize-hidden --wildcard
      "--keep-global-symbol=sparge_*" "--strip-symbol=tmpxft_*" ${object}
    DEPENDS ${archive} VERBATIM)
  add_library(${target} STATIC ${object})
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE C OUTPUT_NAME ${output})
endfunction()

# install_library(targets...): with what find_package(sparge) and pkg-config read.
function(install_library)
  include(CMakePackageConfigHelpers)
  install(TARGETS ${ARGN} EXPORT sparge)
  set(to_cmake ${CMAKE_INSTALL_LIBDIR}/cmake/sparge)
  install(EXPORT sparge NAMESPACE sparge:: DESTINATION ${to_cmake} FILE sparge-config.cmake)
  write_basic_package_version_file(sparge-config-version.cmake COMPATIBILITY SameMinorVersion)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/sparge-config-version.cmake DESTINATION ${to_cmake})

  set(needs)
  foreach(library IN LISTS SPARGE_NEEDS)
    if(NOT IS_ABSOLUTE ${library})
      string(PREPEND library -l)
    endif()
    string(APPEND needs " ${library}")
  endforeach()
  set(to_pc ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
  cmake_path(ABSOLUTE_PATH CMAKE_INSTALL_LIBDIR BASE_DIRECTORY ${CMAKE_INSTALL_PREFIX} OUTPUT_VARIABLE libdir)
  cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${libdir}/pkgconfig OUTPUT_VARIABLE up)
  configure_file(cmake/sparge.pc.in sparge.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/sparge.pc DESTINATION ${to_pc})
  install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
endfunction()
