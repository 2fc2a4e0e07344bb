/* info.h - what xkv-info tells of entries, shared by its tables, its JSON and the report. */
#ifndef INFO_H
#define INFO_H

#include "cli.h"

/* "K", "V", ..., "mixed", or "-" of a group without planes. */
const char *info_group_kind(const xkv_geometry *g, const xkv_group_info *group);
/* "0-3", "7", or "-" of a group without planes. */
cli_text info_group_layers(const xkv_geometry *g, const xkv_group_info *group);
const char *info_codec_name(const xkv_group_info *group);
/* Whether the group's components are quantized. */
bool info_is_coded(const xkv_group_info *group);
/* Why a group is lossless; NULL when that was asked for. */
const char *info_lossless_reason(const xkv_group_info *group);

/* Codec of the first group with planes that is coded with loss. */
const char *info_entry_codec(const xkv_entry *entry, const xkv_entry_info *info);
/* The relative error over all groups that hold planes of `kind`, weighted by their energy; -1 without such planes.
 * Lossless groups have no energy on record, and no error. */
double info_kind_error(const xkv_entry *entry, uint32_t group_count, uint32_t kind);
const char *info_engine_name(const xkv_entry *entry);
/* Whether only the whole prompt can be restored, not its first tokens: the engine's file holds a part that cannot be
 * cut. The reason is then the context's error. */
bool info_is_whole_only(xkv_ctx *ctx, const xkv_entry *entry);
/* Raw 16-bit bytes / all bytes of the entry. */
double info_ratio(const xkv_entry_info *info);

/* "f16, q8_0": the types that planes have, each once. */
cli_text info_element_types(const xkv_geometry *g);
/* A metadata value as text, cut to fit. */
void info_value_text(char *dst, size_t size, const xkv_value *v);
/* "0.1234"; "0" when lossless, "-" when negative: no such planes. */
cli_text info_error_text(double error);

#endif
