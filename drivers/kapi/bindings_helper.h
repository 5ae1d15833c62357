/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What bindgen reads: the headers, constants that are casts in C and so are not seen by it, and the
 * prototypes of helpers.c.
 */
#ifndef PMEM_BINDINGS_HELPER_H
#define PMEM_BINDINGS_HELPER_H

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/dax.h>

/* An external build has no .config entry for the driver. */
#ifndef CONFIG_BLK_DEV_RUST_PMEM_START
#define CONFIG_BLK_DEV_RUST_PMEM_START ""
#define CONFIG_BLK_DEV_RUST_PMEM_SIZE ""
#define CONFIG_BLK_DEV_RUST_PMEM_COUNT "1"
#endif

#define PMEM_DEFAULT_START CONFIG_BLK_DEV_RUST_PMEM_START
#define PMEM_DEFAULT_SIZE CONFIG_BLK_DEV_RUST_PMEM_SIZE
#define PMEM_DEFAULT_COUNT CONFIG_BLK_DEV_RUST_PMEM_COUNT

#define PMEM_CONST(type, name) static const type PMEM_CONST_##name = name

PMEM_CONST(blk_features_t, BLK_FEAT_WRITE_CACHE);
PMEM_CONST(blk_features_t, BLK_FEAT_FUA);
PMEM_CONST(blk_features_t, BLK_FEAT_IO_STAT);
PMEM_CONST(blk_features_t, BLK_FEAT_SYNCHRONOUS);
PMEM_CONST(blk_features_t, BLK_FEAT_NOWAIT);
PMEM_CONST(blk_features_t, BLK_FEAT_DAX);

PMEM_CONST(blk_status_t, BLK_STS_NOTSUPP);
PMEM_CONST(blk_status_t, BLK_STS_IOERR);

PMEM_CONST(blk_opf_t, REQ_OP_MASK);
PMEM_CONST(blk_opf_t, REQ_PREFLUSH);
#if IS_BUILTIN(CONFIG_KUNIT)
PMEM_CONST(blk_opf_t, REQ_FUA);
PMEM_CONST(blk_opf_t, REQ_NOWAIT);
#endif

bool pmem_helper_cpu_has_clwb(void);
bool pmem_helper_cpu_has_clflushopt(void);
int pmem_helper_phys_to_online_node(phys_addr_t start);
void *pmem_helper_page_address(const struct page *page);

#endif /* PMEM_BINDINGS_HELPER_H */
