/* device_opened.h - the device that a test runs on, be it the emulated one or, with XKV_GPU_PLUGIN, a genuine one. */
#ifndef XKV_TEST_DEVICE_OPENED_H
#define XKV_TEST_DEVICE_OPENED_H

#include "emulated.h"

extern fake_cuda_control *control; /* of the emulated device; else NULL */
extern xkv_device *device;

/* Load the plug-in; false, and why on stdout, when there is no device. */
bool find_device(void);
/* Set-up of a group of tests: open it, with two staging buffers of a megabyte. */
int open_the_device(void **state);

/* The device's memory; copying to or from it waits. */
void *device_alloc(uint64_t size);
void device_free(void *p);
void device_copy(void *to, const void *from, uint64_t size);

#endif
