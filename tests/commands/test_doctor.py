"""The doctor on machines that are not here: what it finds and what it advises."""

import pytest

from executor.commands import doctor
from executor.doctor.recipe import Wish
from executor.host.machine import Output
from executor.host.npu_smi import A2, A3, DUO
from tests.doctor import fake, outputs

A2_WISH = Wish(fake.FOLDER, device="npu", dtype="bfloat16", world_size=8)


def examine(machine, wish=None):
    """The document, and its findings by id."""
    document = doctor.examine(machine, fake.ROOT, wish)
    return document, {row["id"]: row for row in document["findings"]}


def errors(document):
    return [row["id"] for row in document["findings"] if row["status"] == "error"]


@pytest.mark.parametrize(
    "machine, wish, found, soc",
    [
        (fake.a2(), A2_WISH, "8 x 910B4 (atlas_800i_a2), 64 GB each: the 64 GB variant", A2),
        (fake.a3(), Wish(fake.FOLDER, "npu", world_size=16), "16 x 910_9392 (atlas_800i_a3), 64 GB each", A3),
        (
            fake.duo(),
            Wish(fake.FOLDER, "npu", dtype="float16", world_size=2),
            "2 x 310P3 (atlas_300i_duo), 48 GB each: the 48 GB variant; 1 card(s) of 2 chip(s)",
            DUO,
        ),
    ],
    ids=["a2", "a3", "duo"],
)
def test_healthy_servers(machine, wish, found, soc):
    for asked in (None, wish, Wish(fake.FOLDER, "npu", soc=soc, world_size=2), Wish(fake.FOLDER, "auto", world_size=1)):
        document, rows = examine(machine, asked)
        assert document["command"] == "doctor" and document["ok"], errors(document)
        assert rows["chips"]["found"].startswith(found)
        assert {rows[name]["status"] for name in ("driver", "firmware", "cann", "kernels", "nnal", "torch_npu")} == {
            "ok"
        }
        assert rows["torch_npu_cann"]["found"].endswith("a documented pair")
        assert all(set(row) == {"id", "status", "found", "wanted", "advice"} for row in document["findings"])
        assert len(rows) == len(document["findings"]), "each id once"


def test_memory_variants_are_told_apart():
    table = outputs.SMI_910B4_32GB
    _, rows = examine(fake.ascend(table, outputs.BOARD_CHIP_A2, chips=2))
    assert rows["chips"]["found"].startswith("2 x 910B4 (atlas_800i_a2), 32 GB each: the 32 GB variant, 0.8 TB/s")
    assert rows["chip_memory_in_use"]["status"] == "warning" and "29096 of 32768" in rows["chip_memory_in_use"]["found"]
    board = outputs.BOARD_CHIP_A2.replace("910B4", "310P3")
    _, rows = examine(fake.ascend(outputs.SMI_310P_24GB, board, chips=1))
    assert "24 GB each: the 24 GB variant" in rows["chips"]["found"] and "1 card(s) of 1 chip" in rows["chips"]["found"]


def test_a_chip_without_memory_in_the_table_is_asked_again():
    table = outputs.SMI_300I_DUO.replace("1529 / 44280", "NA").replace("1412 / 43693", "NA")
    machine = fake.ascend(table, outputs.BOARD_CHIP_A2.replace("910B4", "310P3"), chips=2)
    machine.commands["npu-smi info -t usages -i 2"] = outputs.USAGES_310P
    _, rows = examine(machine)
    assert "24 GB" in rows["chips"]["found"]


def test_laptop():
    document, rows = examine(fake.laptop())
    assert document["ok"] and rows["chips"]["status"] == "note"
    assert not {"cann", "nnal", "jemalloc", "torch_npu"} & set(rows), "nothing of NPUs where none is wanted"
    document, _ = examine(fake.laptop(), Wish(fake.FOLDER, "cpu"))
    assert document["ok"]
    document, rows = examine(fake.laptop(), Wish(fake.FOLDER, "npu"))
    assert not document["ok"] and {"chips", "recipe_device", "torch_npu", "cann"} <= set(errors(document))
    assert "npu-smi is not installed" in rows["chips"]["found"]


CANNOT_RUN = {
    "bf16 on 300I DUO": (fake.duo, Wish(fake.FOLDER, "npu", dtype="bfloat16"), "recipe_dtype"),
    "bf16 on 300I DUO, by the chips": (fake.duo, Wish(fake.FOLDER, "auto", dtype="bfloat16"), "recipe_dtype"),
    "graph on 300I DUO": (fake.duo, Wish(fake.FOLDER, "npu", exe_mode="ge_graph"), "recipe_dtype"),
    "graph on a CPU": (fake.laptop, Wish(fake.FOLDER, "cpu", exe_mode="ge_graph"), "recipe_dtype"),
    "w8a8sc on A2": (fake.a2, Wish(fake.FOLDER, "npu", quantization="w8a8sc"), "recipe_dtype"),
    "another chip": (fake.a3, Wish(fake.FOLDER, "npu", soc=A2), "recipe_device"),
    "too many ranks": (fake.a2, Wish(fake.FOLDER, "npu", world_size=16), "recipe_world_size"),
    "degrees": (fake.a2, Wish(fake.FOLDER, "npu", world_size=8, attn_tp_size=3), "recipe_world_size"),
    "no GPU": (fake.laptop, Wish(fake.FOLDER, "cuda"), "recipe_device"),
    "no gcc to emulate with": (fake.laptop, Wish(fake.FOLDER, "npu_emulated", soc=A2), "recipe_device"),
    "soc of a cpu": (fake.laptop, Wish(fake.FOLDER, "cpu", soc=A2), "recipe_device"),
    "model_path": (fake.a2, Wish("/nowhere", "npu"), "model_path"),
    "model_path without config": (fake.a2, Wish("/models", "npu"), "model_path"),
}


@pytest.mark.parametrize("case", CANNOT_RUN.values(), ids=CANNOT_RUN)
def test_recipes_that_cannot_run(case):
    make, wish, finding = case
    document, rows = examine(make(), wish)
    assert errors(document) == [finding] and not document["ok"]
    assert rows[finding]["advice"], "an error says what to do"


def broken(**changes):
    """An A2 server with files removed (None) or changed, and other attributes updated."""
    machine = fake.a2()
    for path, text in changes.pop("files", {}).items():
        for known in [known for known in machine.files if known.startswith(path)]:
            del machine.files[known]
        if text is not None:
            machine.files[path] = text
    for name, value in changes.items():
        getattr(machine, name).update(value)
    return machine


TOOLKIT = "/usr/local/Ascend/ascend-toolkit/latest"
BROKEN = {
    "npu-smi in use": (broken(commands={"npu-smi info": Output(1, outputs.SMI_OCCUPIED)}), "npu_smi", "warning"),
    "device file": (broken(files={"/dev/hisi_hdc": None}), "device_nodes", "error"),
    "device file closed": (broken(closed={"/dev/davinci0"}), "device_nodes", "error"),
    "firmware": (
        broken(files={"/usr/local/Ascend/firmware/version.info": "Version=7.9.0.1\n"}),
        "firmware",
        "warning",
    ),
    "driver folder of another host": (
        broken(files={"/usr/local/Ascend/driver/version.info": outputs.DRIVER_INFO}),
        "driver",
        "warning",
    ),
    "no CANN": (broken(files={TOOLKIT: None}, environment={"ASCEND_TOOLKIT_HOME": ""}), "cann", "error"),
    "CANN not sourced": (broken(environment={"ASCEND_TOOLKIT_HOME": ""}), "cann", "error"),
    "kernels of another chip": (
        broken(files={f"{TOOLKIT}/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b": None}),
        "kernels",
        "error",
    ),
    "torch and torch_npu": (broken(packages={"torch": "2.9.0"}), "torch_npu", "error"),
    "no torch_npu": (broken(packages={"torch_npu": None}), "torch_npu", "error"),
    "unknown CANN pair": (broken(packages={"torch_npu": "2.8.0.post5"}), "torch_npu_cann", "unknown"),
    "other CANN": (broken(packages={"torch_npu": "2.8.0.post2"}), "torch_npu_cann", "unknown"),
    "NNAL of another release": (
        broken(
            files={"/usr/local/Ascend/nnal": None, "/usr/local/Ascend/nnal/atb/latest/version.info": outputs.ATB_INFO}
        ),
        "nnal",
        "warning",
    ),
    "NNAL of another ABI": (
        broken(environment={"ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1"}),
        "nnal",
        "warning",
    ),
    "import": (
        broken(
            commands={"/usr/bin/python3 -c": Output(1, "", "ImportError: libhccl.so: cannot open shared object file")}
        ),
        "torch_npu_import",
        "error",
    ),
    "no chip seen": (
        broken(commands={"/usr/bin/python3 -c": 'doctor:{"torch": "2.8.0", "cxx11_abi": 0, "npus": 0, "name": ""}'}),
        "torch_npu_import",
        "error",
    ),
    "visible devices": (broken(environment={"ASCEND_RT_VISIBLE_DEVICES": "0, 1"}), "visible_devices", "warning"),
    "master port": (broken(environment={"MASTER_PORT": "20000"}, taken_ports={20000}), "ports", "error"),
    "all ports": (broken(taken_ports=set(range(20000, 20051))), "ports", "error"),
    "HCCL_IF_IP": (broken(environment={"HCCL_IF_IP": "10.9.9.9"}), "hccl_interface", "warning"),
    "HCCL_SOCKET_IFNAME": (broken(environment={"HCCL_SOCKET_IFNAME": "eth9"}), "hccl_interface", "warning"),
    "serve's port": (broken(taken_ports={8000}), "server_port", "warning"),
    "weights": (broken(files={f"{fake.FOLDER}/model-2.safetensors": None}), "model_path", "error"),
    "jemalloc": (broken(files={"/usr/lib/aarch64-linux-gnu/libjemalloc.so.2": None}), "jemalloc", "note"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_broken_servers(case):
    machine, finding, status = case
    wish = Wish(fake.FOLDER, "npu", world_size=2 if finding != "visible_devices" else 1)
    document, rows = examine(machine, wish)
    assert rows[finding]["status"] == status, rows[finding]
    assert (finding in errors(document)) == (status == "error") and (status != "error" or not document["ok"])
    assert rows[finding]["advice"], "says what to do"


def test_chips_that_are_ill_or_of_another_kind():
    machine = fake.a2()
    machine.commands["npu-smi info"] = outputs.SMI_910B4_64GB.replace("OK            ", "Warning       ", 1)
    _, rows = examine(machine)
    assert rows["chip_health"]["status"] == "warning" and rows["chip_health"]["found"] == "card.chip: 0.0 Warning"
    machine.commands["npu-smi info"] = outputs.SMI_ALARM
    del machine.commands["npu-smi info -t board -i 0 -c 0"]
    document, rows = examine(machine, Wish(fake.FOLDER, "npu"))
    assert rows["chips"]["status"] == "error" and "310B1" in rows["chips"]["found"], "not A2, A3 or 310P"


def test_triton_is_forbidden_on_300i_duo_only():
    machine = fake.duo()
    machine.packages["triton"] = "3.2.0"
    document, rows = examine(machine)
    assert errors(document) == ["forbidden_packages"] and rows["forbidden_packages"]["advice"] == "pip uninstall triton"
    machine = fake.a2()
    machine.packages["triton-ascend"] = "3.2.1"
    assert examine(machine)[0]["ok"]


def test_300i_duo_needs_nnal():
    machine = fake.duo()
    del machine.files["/usr/local/Ascend/nnal/atb/latest/version.info"]
    assert errors(examine(machine)[0]) == ["nnal"]
    machine = fake.a2()
    del machine.files["/usr/local/Ascend/nnal/atb/latest/version.info"]
    assert examine(machine)[0]["ok"]


def test_chips_are_counted_by_device_number():
    """Card ids need not ascend with device numbers; ASCEND_RT_VISIBLE_DEVICES means the latter."""
    machine = fake.ascend(outputs.SMI_910B4_32GB.replace("29095/", " 2922/"), outputs.BOARD_CHIP_A2, chips=2)
    machine.environment["ASCEND_RT_VISIBLE_DEVICES"] = "0"
    assert examine(machine)[1]["chip_memory_in_use"]["status"] == "warning", "card 4 is busy"
    header = outputs.MAPPING_910B4.splitlines()[0]
    machine.commands["npu-smi info -m"] = f"{header}\n5 0 0 Ascend 910B4\n4 0 1 Ascend 910B4\n"
    assert examine(machine)[1]["chip_memory_in_use"]["status"] == "ok", "device 0 is card 5, which is free"


def test_visible_devices_bound_the_ranks():
    machine = fake.a2()
    machine.environment["ASCEND_RT_VISIBLE_DEVICES"] = "0,1"
    assert examine(machine, Wish(fake.FOLDER, "npu", world_size=2))[0]["ok"]
    document, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=4))
    assert errors(document) == ["recipe_world_size"] and "2 usable chip(s)" in rows["recipe_world_size"]["found"]


def test_a_container_without_npu_smi_is_known_by_torch():
    machine = fake.a3()
    del machine.commands["npu-smi info"]
    machine.commands["/usr/bin/python3 -c"] = (
        'doctor:{"torch": "2.8.0", "cxx11_abi": 0, "npus": 16, "name": "Ascend910_9362"}'
    )
    _, rows = examine(machine)
    assert rows["chips"]["found"].startswith("16 x 910_9362 (atlas_800i_a3)")


def test_cards_without_driver_are_seen_on_the_bus():
    machine = fake.laptop()
    machine.files["/sys/bus/pci/devices/0000:01:00.0/vendor"] = "0x19e5\n"
    machine.files["/sys/bus/pci/devices/0000:01:00.0/class"] = "0x120000\n"
    document, rows = examine(machine)
    assert rows["chips"]["status"] == "warning" and "1 Huawei accelerator(s) on the PCI bus" in rows["chips"]["found"]
    assert document["ok"]


def test_torch_npu_without_cann_breaks_torch():
    machine = fake.laptop()
    machine.packages["torch_npu"] = "2.8.0"
    machine.commands["/usr/bin/python3 -c"] = Output(1, "", "ImportError: libhccl.so: cannot open shared object file\n")
    document, rows = examine(machine, Wish(fake.FOLDER, "cpu"))
    assert rows["torch_npu_import"]["status"] == "warning" and "AUTOLOAD" in rows["torch_npu_import"]["advice"]


NODES = {
    "two": (["192.168.0.10", "192.168.0.11"], "ok", "this one is number 1, master 192.168.0.10"),
    "placeholders": (["xxx.xxx.xxx.xxx", "192.168.0.11"], "error", "placeholders: xxx"),
    "not among them": (["192.168.0.1", "192.168.0.2"], "error", "none of IPs"),
    "twice": (["192.168.0.11", "192.168.0.11"], "error", "twice"),
    "names": (["node-a", "192.168.0.11"], "error", "cannot resolve node-a"),
}


@pytest.mark.parametrize("case", NODES.values(), ids=NODES)
def test_nodes(case):
    ips, status, said = case
    machine = fake.set_env(fake.a2(), ips=ips)
    machine.files["/etc/hccn.conf"] = outputs.HCCN_CONF
    _, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=16, attn_tp_size=8))
    assert rows["nodes"]["status"] == status and said in rows["nodes"]["found"]
    assert rows["recipe_world_size"]["status"] == "ok", "two nodes have sixteen chips"
    assert rows["npu_network"]["found"] == "/etc/hccn.conf names 2 addresses for 8 chips"


def test_placeholders_alone_are_this_node():
    machine = fake.set_env(fake.a2(), ips=["xxx.xxx.xxx.xxx", "xxx.xxx.xxx.xxx"])
    _, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=8))
    assert (rows["nodes"]["status"], rows["recipe_world_size"]["status"]) == ("ok", "ok")
    _, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=16))
    assert (rows["nodes"]["status"], rows["recipe_world_size"]["status"]) == ("error", "error")


def test_ranks_are_not_counted_against_chips_that_are_not_here():
    """One error says that there is no NPU; another that allows at most 0 ranks helps nobody."""
    document, rows = examine(fake.laptop(), Wish(fake.FOLDER, "npu", world_size=8))
    assert rows["recipe_world_size"]["status"] == "unknown"
    assert "recipe_device" in errors(document) and "at most 0" not in str(document)
    machine = fake.a2()
    machine.environment["ASCEND_RT_VISIBLE_DEVICES"] = " 0"
    document, rows = examine(machine, Wish(fake.FOLDER, "npu"))
    assert "see visible_devices" in rows["recipe_world_size"]["advice"]
    assert "recipe_world_size" in errors(document)


def test_interface_is_the_way_to_the_master():
    machine = fake.set_env(fake.a2(), ips=["192.168.0.10", "192.168.0.11"])
    wish = Wish(fake.FOLDER, "npu", world_size=16)
    assert examine(machine, wish)[1]["hccl_interface"]["found"].startswith("enp1s0 192.168.0.11")
    machine.routed = False
    assert examine(machine, wish)[1]["hccl_interface"]["status"] == "error"
    machine.environment["SLURM_NNODES"] = "3"
    assert "recipe_world_size" in errors(examine(machine, wish)[0]), "16 ranks on 3 nodes"


def test_memory_of_chips_bounds_the_model():
    wish = Wish(fake.FOLDER, "npu", world_size=2)
    for size_gb, status in ((60, "ok"), (120, "warning"), (200, "error")):
        _, rows = examine(fake.with_model(fake.a2(), size_gb * 10**9), wish)
        assert rows["recipe_memory"]["status"] == status, size_gb


def test_hub_ids():
    wish = Wish("Qwen/Qwen3-VL-8B-Instruct", "cpu")
    machine = fake.laptop()
    assert examine(machine, wish)[1]["model_path"]["status"] == "note"
    machine.files[f"{fake.ROOT}/Qwen/another/config.json"] = "{}"
    assert examine(machine, wish)[1]["model_path"]["status"] == "warning", "a mistyped folder looks like a hub id"
    machine.environment["HF_HUB_OFFLINE"] = "1"
    assert errors(examine(machine, wish)[0]) == ["model_path"]
    cached = "/home/user/.cache/huggingface/hub/models--Qwen--Qwen3-VL-8B-Instruct/snapshots/abc/config.json"
    machine.files[cached] = "{}"
    assert examine(machine, wish)[1]["model_path"]["status"] == "ok"


def test_old_python_is_told_what_is_needed():
    machine = fake.laptop(python_version=(3, 8, 18))
    document, rows = examine(machine)
    assert errors(document) == ["python"] and rows["python"]["wanted"] == "3.11 or newer"
    machine.commands["python3.11 -c"] = ""
    assert examine(machine)[1]["python"]["status"] == "warning"


def test_weights_that_were_compressed_for_a_number_of_ranks():
    machine = fake.duo()
    machine.files = {path: content for path, content in machine.files.items() if not path.startswith(fake.FOLDER)}
    machine.files[f"{fake.FOLDER}/config.json"] = "{}"
    for rank in (0, 1):
        machine.files[f"{fake.FOLDER}/part{rank}-of-2/quant_model_weight_w8a8sc.safetensors"] = 2**30
    _, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=2))
    assert rows["model_path"]["status"] == "ok" and "2 weight file(s), 2.1 GB" in rows["model_path"]["found"]
    _, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=4, attn_tp_size=4))
    assert rows["model_path"]["status"] == "error"
    assert "was compressed for 2 rank(s), the recipe has 4" in rows["model_path"]["found"]
    assert "attn_tp_size=2" in rows["model_path"]["advice"]
    del machine.files[f"{fake.FOLDER}/part0-of-2/quant_model_weight_w8a8sc.safetensors"]
    _, rows = examine(machine, Wish(fake.FOLDER, "npu", world_size=2))
    assert rows["model_path"]["status"] == "error" and "part0-of-2" in rows["model_path"]["found"]
