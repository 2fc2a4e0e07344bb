/* backend.h - finding the plug-in of a device backend. */
#ifndef XKV_BACKEND_H
#define XKV_BACKEND_H

#include "base.h"
#include "plugin.h"
#include "xkv/kernels.h"

/* What XKV_BACKEND asks for, AUTO when it is not set; false when it is none of its values. */
bool xkv_backend_wanted(uint32_t *backend);

/* The plug-in and how many devices it has; NULL or none with the reason in why[why_size]. */
const xkv_plugin *xkv_backend_plugin(uint32_t *count, char *why, size_t why_size);

#endif
