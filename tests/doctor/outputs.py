"""What real machines printed, as far as the parsers need it: each text names the public document it was printed in.

Of many equal rows the first are kept (said where); nothing is made up.
"""

# github.com/Project-HAMi/HAMi-WebUI, issue 47: two of the chips, as shown there.
SMI_910B4_64GB = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4-1             | OK            | 91.3        33                0    / 0             |
| 0                         | 0000:xx:00.0  | 0           0    / 0          3197 / 65536         |
+===========================+===============+====================================================+
| 1     910B4-1             | OK            | 88.1        32                0    / 0             |
| 0                         | 0000:xx:00.0  | 0           0    / 0          3197 / 65536         |
"""

# github.com/vllm-project/vllm-ascend, issue 843: two of four chips, and two lines of who uses them. No space stands
# before the slash when the number is long.
SMI_910B4_32GB = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.6                   Version: 23.0.6                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 4     910B4               | OK            | 89.2        39                0    / 0             |
| 0                         | 0000:81:00.0  | 0           0    / 0          29096/ 32768         |
+===========================+===============+====================================================+
| 5     910B4               | OK            | 87.7        40                0    / 0             |
| 0                         | 0000:41:00.0  | 0           0    / 0          29095/ 32768         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 4       0                 | 498807        | python                   | 26323                   |
+===========================+===============+====================================================+
| 5       0                 | 499212        | python                   | 26323                   |
+===========================+===============+====================================================+
"""

# github.com/vllm-project/vllm-ascend, issue 1903: two of the chips.
SMI_910B3 = """\
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 98.4        50                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3369 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | 96.5        53                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3368 / 65536         |
"""

# github.com/vllm-project/vllm-ascend, issue 2534 (the head from its issue 2035, npu-smi 24.1.rc3.7): three of 16 dies.
SMI_A3 = """\
| npu-smi 24.1.rc3.7               Version: 24.1.rc3.7                                           |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3195 / 65536         |
+===========================+===============+====================================================+
| 1     Ascend910           | OK            | 186.3       36                0    / 0             |
| 0     2                   | 0000:99:00.0  | 0           0    / 0          3415 / 65536         |
+------------------------------------------------------------------------------------------------+
"""

# github.com/Syllo/nvtop, issue 421: an Atlas 300I Duo, the whole table of chips.
SMI_300I_DUO = """\
+--------------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                                   Version: 25.2.0                                       |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 2       310P3                 | OK              | NA           45                0     / 0             |
| 0       0                     | 0000:01:00.0    | 0            1529 / 44280                            |
+-------------------------------+-----------------+------------------------------------------------------+
| 2       310P3                 | OK              | NA           43                0     / 0             |
| 1       1                     | 0000:01:00.0    | 0            1412 / 43693                            |
+===============================+=================+======================================================+
"""

# github.com/vllm-project/vllm-ascend, issue 1141: copied by hand there, with other spaces and "0K". Two of four rows.
SMI_300I_DUO_BY_HAND = """\
| npu-smi 25.0.rc1.1            Version: 25.0.rc1.1 |
| NPU Name | Health | Power(W) Temp(C) Hugepages-Usage(page)|
| Chip | Bus-Id | AICore(%) Memory-Usage(MB) HBM-Usage(MB) |
+======================================================================+
| 0 310P3 | 0K | 89.2 39 0 / 0 |
| 0 | 0000:81:00.0 | 0 0 / 0 1460/ 44280 |
+===================================================================+
| 1 310P3 | 0K | 87.7 40 0 / 0 |
| 0 | 0000:41:00.0 | 0 0 / 0 1479/ 43693 |
"""

# Project-HAMi, documentation of its Ascend plugin on a machine with one 310P3: the whole table of chips.
SMI_310P_24GB = """\
+--------------------------------------------------------------------------------------------------------+
| npu-smi 22.0.4                                   Version: 22.0.4                                       |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)     Hugepages-Usage(page)     |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 7       310P3                 | OK              | NA           28                0    / 0              |
| 0       0                     | 0000:00:07.0    | 0            1805 / 21527                            |
+-------------------------------+-----------------+------------------------------------------------------+
"""

# hiascend.com/forum, thread 02114177666655790005: chips of another kind, in alarm. One of them.
SMI_ALARM = """\
| npu-smi 23.0.5 Version: 23.0.5 |
| NPU Name | Health | Power(W) Temp(C) Hugepages-Usage(page) |
| Chip Device | Bus-Id | AICore(%) Memory-Usage(MB) |
| 0 310B1 | Alarm | 0.0 49 15 / 15 |
| 0 0 | 0000:11:00.0 | 0 600 / 7578 |
"""

# Ascend's guide for containers that share chips: what npu-smi says there.
SMI_OCCUPIED = "dcmi model initialized failed, because the device is used. ret is -8020\n"

# Ascend's page "Method for Obtaining the SoC Model of Ascend Chips" (`npu-smi info -m`, A2), as shown there.
MAPPING_910B4 = """\
        NPU ID                         Chip ID                        Chip Logic ID                  Chip Name
        0                              0                              0                              Ascend 910B4
        0                              1                              -                              Mcu
        1                              0                              1                              Ascend 910B4
        1                              1                              -                              Mcu
"""

# github.com/vllm-project/vllm-ascend, its tests of CPU binding (`npu-smi info -m`, A3).
MAPPING_A3 = """\
NPU ID  Chip ID  Chip Logic ID  Chip Phy-ID Chip Name
0 0 0 0 Ascend910
0 1 1 1 Ascend910
0 2 - - Mcu
"""

# The same page of Ascend (`npu-smi info -t board -i 0 -c 0`).
BOARD_CHIP_A2 = """\
        NPU ID                         : 0
        Chip ID                        : 0
        Chip Type                      : Ascend
        Chip Name                      : 910B4
"""
BOARD_CHIP_A3 = """\
        NPU ID                         : 0
        NPU Name                       : 9392
        Chip ID                        : 0
        Chip Name                      : Ascend910
"""

# github.com/Ascend/mind-cluster, guide to collecting logs (`npu-smi info -i 0 -t board`): five of its lines.
BOARD_CARD = """\
        NPU ID                         : 0
        Software Version               : 23.0.5
        Firmware Version               : 7.1.0.7.220
        Compatibility                  : OK
        PCIe Bus Info                  : 0000:61:00.0
"""

# github.com/gpustack/gpustack, detector of NPUs and tests/detectors/npu_smi/test_npu_smi.py: the two examples of
# `npu-smi info -t usages -i N`, an HBM chip and a 310P, shortened.
USAGES_HBM = """\
NPU ID                         : 0
Chip Count                     : 1

DDR Capacity(MB)               : 15171
DDR Usage Rate(%)              : 3
HBM Capacity(MB)               : 32768
HBM Usage Rate(%)              : 0
Chip ID                        : 0
"""
USAGES_310P = """\
NPU ID                         : 1
Chip Count                     : 1

DDR Capacity(MB)               : 21534
DDR Usage Rate(%)              : 4
Vectorcore Usage Rate(%)       : 0
Chip ID                        : 0
"""

# github.com/vllm-project/vllm-ascend, issue 451: driver/version.info.
DRIVER_INFO = """\
Version=24.1.rc3
ascendhal_version=7.35.23
aicpu_version=1.0
Innerversion=V100R001C19SPC001B124
compatible_version=[V100R001C13],[V100R001C15],[V100R001C17],[V100R001C18],[V100R001C19]
compatible_version_fw=[7.0.0,7.5.99]
package_version=24.1.rc3
"""

# github.com/Ascend/mind-cluster, guide to collecting logs: firmware/version.info.
FIRMWARE_INFO = """\
Version=7.1.0.11.220
firmware_version=1.0
package_version=23.0.7
compatible_version_drv=[23.0.rc3,23.0.rc3.],[23.0.0,23.0.0.]
"""

# github.com/vllm-project/vllm-ascend, issue 4621: ascend_toolkit_install.info.
INSTALL_INFO = """\
package_name=Ascend-cann-toolkit
version=8.3.RC2
innerversion=V100R001C23SPC002B210
compatible_version=[V100R001C15],[V100R001C18],[V100R001C19],[V100R001C20],[V100R001C21],[V100R001C23]
arch=x86_64
os=linux
path=/usr/local/Ascend/ascend-toolkit/8.3.RC2/x86_64-linux
"""

# github.com/vllm-project/vllm-ascend, issue 451: ascend-toolkit/latest/version.cfg, four of its lines.
VERSION_CFG = """\
# version: 1.0
runtime_running_version=[7.6.0.1.220:8.0.0]
toolkit_running_version=[7.6.0.1.220:8.0.0]
toolkit_upgrade_version=[7.6.0.1.220:8.0.0]
toolkit_installed_version=[7.6.0.1.220:8.0.0]
"""

# A user's notes on a machine with several toolkits, on GitHub: one line of its version.cfg.
VERSION_CFG_SEVERAL = "toolkit_installed_version=[7.0.0.5.242:7.0.RC1][7.1.0.3.220:7.0.0][7.3.0.1.231:8.0.RC2]\n"

# A user's notes on the image mindie:2.1.RC1-800I-A2, on GitHub: ascend-toolkit/latest/toolkit/version.info, its head.
TOOLKIT_INFO = """\
Version=8.2.0.0.201
version_dir=8.2.RC1
timestamp=20250724_194044950
required_package_amct_acl_version="8.2"
"""

# github.com/vllm-project/vllm-ascend, issue 451: nnal/atb/latest/version.info.
ATB_INFO = """\
    Ascend-cann-atb : 8.0.0
    Ascend-cann-atb Version : 8.0.0.B100
    Platform : aarch64
    branch : br_release_cann_8.0.0_20250521
    commit id : af0ec2e868267322b4fb7949da3ae7af769d9644
"""

# A user's notes on updating drivers, on GitHub: /etc/ascend_install.info.
ASCEND_INSTALL_INFO = """\
UserName=HwHiAiUser
UserGroup=HwHiAiUser
Driver_Install_Type=full
Driver_Install_Path_Param=/usr/local/Ascend
Driver_Install_For_All=yes
Driver_Install_Mode=normal
Firmware_Install_Type=full
Firmware_Install_Path_Param=/usr/local/Ascend
"""

# PaddlePaddle, guide to training on Ascend in containers: /etc/hccn.conf, two of its devices.
HCCN_CONF = """\
address_0=192.168.10.21
netmask_0=255.255.255.0
address_1=192.168.20.21
netmask_1=255.255.255.0
"""
